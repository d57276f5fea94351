"""What a forward pass promises beyond the right numbers: states, failures, routing and scratch."""

from __future__ import annotations

import numpy as np
import pytest
from golden_models import Golden, ResidentExperts, assert_close, golden

from moestream.errors import ConfigError, MoestreamError, ReadError
from moestream.models.batch import Batch
from moestream.models.model import Model
from moestream.models.states import SequenceStates, nbytes_fixed, nbytes_per_token
from moestream.ops.base import KVCache, Ops
from moestream.ops.reference import ReferenceOps


def resident(model: Model) -> ResidentExperts:
    assert isinstance(model.experts, ResidentExperts)
    return model.experts


def test_failed_reads_fail_their_rows_only(tiny: Golden, exact_ops: Ops) -> None:
    """Rows that needed the expert are reported; the others are bit for bit what they are without the failure."""
    model = tiny.model(exact_ops)
    layer = model.config.moe_layers[-1]  # later layers would carry the failure on to later rows
    chunks = [tiny.ids(1), tiny.ids(2)]
    router = np.concatenate([tiny.arrays["router_1"][-1], tiny.arrays["router_2"][-1]])  # [T, k]
    victim = int(router[0, 0])
    needing = np.flatnonzero((router == victim).any(axis=1))
    clean = model.forward(Batch.of([(ids, model.new_states()) for ids in chunks], all_logits=True))
    error = ReadError("disk on fire")
    resident(model).fail[layer, victim] = error
    batch = Batch.of([(ids, model.new_states()) for ids in chunks], all_logits=True)
    logits = model.forward(batch)
    assert [row for row, _ in batch.failures] == needing.tolist()
    assert all(reason is error for _, reason in batch.failures)
    whole = np.setdiff1d(np.arange(len(logits)), needing)
    assert whole.size
    assert np.array_equal(logits[whole], clean[whole])
    assert np.isfinite(logits).all()


def test_lost_experts_are_an_error() -> None:
    """A source that forgets a pair without reporting it must not look like a fast source."""
    model = golden("qwen3-f16-single").model(ReferenceOps())
    stream = resident(model).stream

    def lossy(layer: int, ids: np.ndarray) -> object:
        waves = stream(layer, ids)
        waves.waves.clear()
        return waves

    model.experts.stream = lossy  # type: ignore[method-assign,assignment]
    with pytest.raises(MoestreamError, match="layer 0: the expert store served 0 of 15"):
        model.forward(Batch.of([([1, 2, 3, 4, 5], model.new_states())]))


def test_non_finite_values_stay_in_their_sequence(tiny: Golden, exact_ops: Ops) -> None:
    model = tiny.model(exact_ops)
    ids, states = tiny.ids(2), [model.new_states(), model.new_states()]
    expected = model.forward(Batch.of([(ids, model.new_states()), (ids, model.new_states())]))[1]
    for s in states[:1]:
        s.reserve(1)
        for layer in s.layers:
            if isinstance(layer, KVCache):
                layer.v[:] = np.nan
                layer.k[:] = np.nan
                layer.length = 1
            else:
                layer.s[:] = np.nan
    logits = model.forward(Batch.of([(ids, s) for s in states]))
    assert np.isnan(logits[0]).any()
    assert_close(logits[1], expected, tiny.logits_bound, "the healthy sequence")


def test_imposed_routing_equals_the_routers_own(exact_ops: Ops) -> None:
    """Imposing what the router would choose changes nothing, in whatever order the ids come."""
    tiny = golden("qwen3_5-mlx4")
    model = tiny.model(exact_ops)
    own = model.forward(Batch.of([(tiny.ids(1), model.new_states())], all_logits=True))
    order = {layer: i for i, layer in enumerate(model.config.moe_layers)}
    model.router_override = lambda layer, rows: tiny.arrays["router_1"][order[layer]][:rows, ::-1].astype(np.int32)
    imposed = model.forward(Batch.of([(tiny.ids(1), model.new_states())], all_logits=True))
    assert np.abs(imposed - own).max() <= tiny.logits_bound
    model.router_override = lambda layer, rows: np.tile(np.array([[0, 1, 2]], np.int32), (rows, 1))
    other = model.forward(Batch.of([(tiny.ids(1), model.new_states())], all_logits=True))
    assert np.abs(other - own).max() > 0.1


def test_fewer_active_experts_are_renormalised(exact_ops: Ops) -> None:
    """With one expert its weight is 1: the same as imposing the router's first choice."""
    tiny = golden("qwen3_5-mlx4")
    model = tiny.model(exact_ops)
    one = Model(model.config, exact_ops, model._weights, model.experts, active_experts=1)
    seen: list[tuple[int, ...]] = []
    stream = resident(model).stream
    one.experts.stream = lambda layer, ids: seen.append(ids.shape) or stream(layer, ids)  # type: ignore[method-assign]
    logits = one.forward(Batch.of([(tiny.ids(2), one.new_states())]))
    assert np.isfinite(logits).all()
    assert seen == [(tiny.ids(2).size, 1)] * 4
    assert np.abs(logits[0] - tiny.logits(2)[-1]).max() > 0.1
    with pytest.raises(ConfigError, match="active_experts is 8"):
        Model(model.config, exact_ops, model._weights, model.experts, active_experts=8)


def test_logits_rows_choose_rows(exact_ops: Ops) -> None:
    tiny = golden("qwen3-mlx4")
    model = tiny.model(exact_ops)
    batch = Batch.of([(tiny.ids(1), model.new_states())])
    batch.logits_rows = np.array([], np.int32)
    assert model.forward(batch).shape == (0, model.config.vocab_size)


@pytest.mark.parametrize("exact", [True, False])
def test_state_bytes_are_as_planned(tiny: Golden, exact: bool) -> None:
    config = tiny.model(ReferenceOps()).config
    states = SequenceStates(config, exact, limit=100)
    assert states.nbytes == nbytes_fixed(config)
    for tokens, capacity in ((1, 64), (64, 64), (65, 100), (100, 100), (101, 101)):
        states.reserve(tokens)
        assert states.nbytes == nbytes_fixed(config) + capacity * nbytes_per_token(config, exact)


def test_growing_keeps_what_was_cached() -> None:
    config = golden("qwen3-mlx4").model(ReferenceOps()).config
    states = SequenceStates(config, exact=True)
    cache = states.layers[0]
    assert isinstance(cache, KVCache)
    states.reserve(3)
    cache.k[:, :3], cache.v[:, :3] = 1.0, 2.0
    cache.length = states.length = 3
    states.reserve(200)
    assert (cache.k[:, :3] == 1.0).all()
    assert (cache.v[:, :3] == 2.0).all()
