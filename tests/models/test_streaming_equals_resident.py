"""Streaming is a matter of time only: every cache mode and size gives the logits of a resident model, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from golden_models import Golden, make_cpu_ops

from moestream.config import CacheMode
from moestream.experts.native_reader import make_reader
from moestream.experts.python_reader import PythonReader
from moestream.experts.reader import Reader
from moestream.experts.store import ExpertStore
from moestream.models.batch import Batch
from moestream.models.model import Model
from moestream.models.registry import parse_config
from moestream.models.weights import map_weights
from moestream.ops.base import F32, Ops
from moestream.ops.reference import ReferenceOps


@pytest.fixture(params=["reference", "exact", "fast"])
def any_ops(request: pytest.FixtureRequest) -> Ops:
    """Every backend in every mode."""
    return ReferenceOps() if request.param == "reference" else make_cpu_ops(exact=request.param == "exact")


def conversation(tiny: Golden, model: Model) -> F32:
    """Logits of a chunked prompt, a second sequence that joins, and a few steps of both together."""
    first, second = model.new_states(), model.new_states()
    out = [
        model.forward(Batch.of([(tiny.ids(0)[:70], first)])),
        model.forward(Batch.of([(tiny.ids(0)[70:90], first), (tiny.ids(1)[:9], second)])),
    ]
    for t in range(5):
        out.append(
            model.forward(Batch.of([(tiny.ids(1)[9 + t : 10 + t], second), (tiny.ids(0)[90 + t : 91 + t], first)]))
        )
    return np.concatenate(out)


def streamed(tiny: Golden, ops: Ops, slots: int, mode: CacheMode, reader: Reader) -> Model:
    """The model with its experts on disk."""
    config, names = parse_config(tiny.checkpoint.config)
    weights = map_weights(tiny.checkpoint, config, names)
    tables = [weights.experts.get(layer) for layer in range(len(config.layers))]
    return tiny.model(ops, ExpertStore(tables, tiny.checkpoint.files, slots, mode, reader))


@pytest.mark.parametrize("mode", ["arena", "page", "none"])
def test_streaming_equals_resident(tiny: Golden, any_ops: Ops, mode: CacheMode) -> None:
    expected = conversation(tiny, tiny.model(any_ops))
    reader = make_reader(4)
    sizes = (3, 20) if any_ops.name == "reference" else (1, 3, 8, 20, 28)  # k is 3; 28 hold every expert of the largest
    for slots in sizes:
        assert np.array_equal(conversation(tiny, streamed(tiny, any_ops, slots, mode, reader)), expected), slots
    reader.close()


def test_the_reader_without_a_compiler_streams_the_same(tiny: Golden, any_ops: Ops) -> None:
    expected = conversation(tiny, tiny.model(any_ops))
    reader = PythonReader()
    assert np.array_equal(conversation(tiny, streamed(tiny, any_ops, 4, "arena", reader)), expected)
    reader.close()
