"""The storage forms of experts give the same matrices; what is wrong with them is said."""

import numpy as np
import pytest
from checkpoint_build import AFFINE4, BF16, module, normal, read_range, write_folder

from moestream.checkpoint import quant
from moestream.checkpoint.encoding import Encoding
from moestream.checkpoint.index import open_checkpoint
from moestream.checkpoint.safetensors import NewTensor
from moestream.errors import TensorError

E, H, I = 5, 192, 64  # noqa: E741
PREFIX = "language_model.model.layers.3.mlp"
GATE, UP, DOWN = normal((E, I, H), 1), normal((E, I, H), 2), normal((E, H, I), 3)
PROJECTIONS = {"gate_proj": GATE, "up_proj": UP, "down_proj": DOWN}


def stacks(encoding, prefix=PREFIX):
    return [t for name, w in PROJECTIONS.items() for t in module(f"{prefix}.switch_mlp.{name}", w, encoding)]


def fused(encoding, suffix=""):
    gate_up = np.concatenate([GATE, UP], axis=1)
    return module(f"{PREFIX}.experts.gate_up_proj", gate_up, encoding, suffix) + module(
        f"{PREFIX}.experts.down_proj", DOWN, encoding, suffix
    )


def singles(encoding):
    return [
        t
        for e in reversed(range(E))
        for name, w in PROJECTIONS.items()
        for t in module(f"{PREFIX}.experts.{e}.{name}", w[e], encoding)
    ]


FORMS = {
    "stacks": stacks,
    "fused": fused,
    "fused with .weight": lambda encoding: fused(encoding, ".weight"),
    "one by one": singles,
}


def read_expert(ckpt, table, e):
    """Decoded gate, up and down of expert e, from the table's ranges alone."""
    raw = [read_range(ckpt, r) for r in table.ranges[e].tolist()]
    out = []
    for layout in table.layout.matrices:
        count = len(layout.part_nbytes)
        out.append(quant.decode(layout, raw[:count]))
        raw = raw[count:]
    assert raw == []
    return out


@pytest.mark.parametrize("encoding", [BF16, Encoding("f32"), AFFINE4, Encoding("affine", 3, 32, "f16")], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shards", [1, 2])
def test_all_forms_give_the_same_matrices(tmp_path, form, encoding, shards):
    ckpt = open_checkpoint(write_folder(tmp_path / "m", FORMS[form](encoding), shards=shards, align=1))
    table = ckpt.experts(PREFIX, E, H, I)
    assert table.num_experts == E
    assert table.ranges.shape == (E, len(table.layout.part_nbytes), 3)
    assert (table.ranges[:, :, 2] == table.layout.part_nbytes).all()
    for e in range(E):
        for got, w in zip(read_expert(ckpt, table, e), PROJECTIONS.values(), strict=True):
            layout_parts = quant.encode(w[e], encoding)
            want = quant.decode(table.layout.matrices[0 if w is not DOWN else 2], layout_parts)
            np.testing.assert_array_equal(got, want)


def test_mixed_precision_between_projections(tmp_path):
    encodings = {"gate_proj": AFFINE4, "up_proj": Encoding("affine", 2, 32), "down_proj": BF16}
    tensors = [t for n, w in PROJECTIONS.items() for t in module(f"{PREFIX}.switch_mlp.{n}", w, encodings[n])]
    config = {
        "quantization": {
            "bits": 4,
            "group_size": 64,
            f"{PREFIX}.switch_mlp.up_proj": {"bits": 2, "group_size": 32},
            f"{PREFIX}.switch_mlp.down_proj": False,
        }
    }
    table = open_checkpoint(write_folder(tmp_path / "m", tensors, config)).experts(PREFIX, E, H, I)
    assert [m.encoding for m in table.layout.matrices] == list(encodings.values())
    assert table.ranges.shape == (E, 7, 3)


def replaced(tensors, name, encoding=None, w=None):
    """The tensors with one module stored otherwise, or left out."""
    kept = [t for t in tensors if t.name.rsplit(".", 1)[0] != f"{PREFIX}.{name}"]
    return kept if encoding is None else kept + module(f"{PREFIX}.{name}", w, encoding)


WRONG = {
    "none": ([NewTensor("x", "U8", (1,), [b"x"])], f"no experts under '{PREFIX}': looked for switch_mlp.gate_proj"),
    "stack without down": (
        replaced(stacks(AFFINE4), "switch_mlp.down_proj"),
        f"tensor '{PREFIX}.switch_mlp.down_proj.weight' is missing",
    ),
    "fused without down": (fused(BF16)[:1], f"tensor '{PREFIX}.experts.down_proj.weight' is missing"),
    "expert missing": (replaced(singles(BF16), "experts.3.up_proj"), "experts.3.up_proj.weight' is missing"),
    "transposed": (
        module(f"{PREFIX}.experts.gate_up_proj", normal((E, H, 2 * I)), BF16, "") + fused(BF16)[1:],
        r"gate_up_proj' has shape \[5, 192, 128\], expected \[5, 128, 192\]",
    ),
    "one expert differs": (
        replaced(singles(AFFINE4), "experts.2.up_proj", Encoding("affine", 8, 64), UP[2]),
        "experts.2.up_proj is affine-8 g64, .*experts.0.up_proj is affine-4 g64",
    ),
    "more experts than said": (
        singles(BF16) + module(f"{PREFIX}.experts.{E}.gate_proj", GATE[0], BF16),
        "experts holds more than the 5 experts of config.json",
    ),
    "fewer experts in the stack": (
        [t for n, w in PROJECTIONS.items() for t in module(f"{PREFIX}.switch_mlp.{n}", w[:4], BF16)],
        r"shape \[4, 64, 192\], expected \[5, 64, 192\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_experts(case, tmp_path):
    tensors, message = WRONG[case]
    ckpt = open_checkpoint(write_folder(tmp_path / "m", tensors))
    with pytest.raises(TensorError, match=message):
        ckpt.experts(PREFIX, E, H, I)
