"""The MLX goldens through ``mlx-lm`` itself, where it is installed: its reading of the layout must be ours."""

from __future__ import annotations

import numpy as np
import pytest
from golden_models import Golden, assert_close, golden

pytestmark = pytest.mark.oracle


def mlx_logits(golden_model: Golden, ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of mlx-lm with activations in float32."""
    pytest.importorskip("mlx.core", reason="optional: pip install mlx[cpu] mlx-lm")
    pytest.importorskip("mlx_lm", reason="optional: pip install mlx[cpu] mlx-lm")
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(golden_model.folder)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(ids)[None])[0].astype(mx.float32))


@pytest.mark.parametrize("name", ["qwen3_5-mlx4", "qwen3-mlx4"])
def test_mlx_reads_the_goldens_as_we_do(name: str) -> None:
    tiny = golden(name)
    assert_close(mlx_logits(tiny, tiny.ids(1)), tiny.logits(1), 4 * tiny.logits_bound, "mlx-lm")
