"""Passes that rest: whatever runs meanwhile, the result is that of a resident model without a rest, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice, pairwise

import numpy as np
import pytest
from golden_models import Golden, ResidentExperts, golden, make_cpu_ops, run_chunked
from streamed import BadSectors, check_idle

from moestream.config import CacheMode
from moestream.errors import ReadError
from moestream.experts.native_reader import make_reader
from moestream.experts.python_reader import PythonReader
from moestream.experts.reader import Reader
from moestream.experts.store import ExpertStore
from moestream.models.batch import Batch
from moestream.models.model import Model
from moestream.models.registry import parse_config
from moestream.models.states import SequenceStates
from moestream.models.weights import map_weights
from moestream.ops.base import F32, Ops
from moestream.ops.reference import ReferenceOps

SWEEP = 90
"""Tokens of the sweep that rests."""


@pytest.fixture(params=["reference", "exact", "fast"])
def any_ops(request: pytest.FixtureRequest) -> Ops:
    """Every backend in every mode."""
    return ReferenceOps() if request.param == "reference" else make_cpu_ops(exact=request.param == "exact")


@pytest.fixture(autouse=True)
def many_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waves and blocks of few rows."""
    monkeypatch.setattr("moestream.experts.stream.SWEEP_WAVE", 3)
    monkeypatch.setattr("moestream.experts.stream.LONGEST_WAVE", 5)
    monkeypatch.setattr("moestream.experts.store.LANDING_SLOTS", 2)
    monkeypatch.setattr("moestream.models.batch.BLOCK", 32)
    monkeypatch.setattr("moestream.models.batch.ALIGNED", 16)
    monkeypatch.setattr("moestream.models.batch.SEEN", 16 * 80)  # the last rows of a sweep come in less than a block


def streamed(tiny: Golden, ops: Ops, slots: int, mode: CacheMode, reader: Reader) -> Model:
    """The model with its experts on disk, read ahead where that is possible."""
    config, names = parse_config(tiny.checkpoint.config)
    weights = map_weights(tiny.checkpoint, config, names)
    tables = [weights.experts.get(layer) for layer in range(len(config.layers))]
    store = ExpertStore(tables, tiny.checkpoint.files, slots, mode, reader)
    model = tiny.model(ops, store)
    model.read_ahead = store
    return model


def store_of(model: Model) -> ExpertStore:
    assert isinstance(model.experts, ExpertStore)
    return model.experts


class Others:
    """Two sequences that get a token in every rest, now and then beside a prompt of more rows than a token has."""

    def __init__(self, tiny: Golden, model: Model) -> None:
        self.model = model
        self.states = [model.new_states(), model.new_states()]
        self.ids = tiny.ids(1)
        self.out = [model.forward(Batch.of([(self.ids[:7], self.states[0]), (self.ids[:9], self.states[1])]))]

    def step(self) -> None:
        n = len(self.out)
        rows = [(self.ids[n % 9 : n % 9 + 1], self.states[0]), (self.ids[n % 7 : n % 7 + 1], self.states[1])]
        if n % 4 == 0:
            rows.append((self.ids[:20], self.model.new_states()))
        self.out.append(self.model.forward(Batch.of(rows)))


def rest_everywhere(model: Model, batch: Batch, meanwhile: Callable[[], None]) -> tuple[F32, list[str]]:
    """Logits of a pass that rests after each of its pieces, and what these pieces were."""
    pieces, names = model.layers(batch), []
    while True:
        try:
            names.append(next(pieces))
        except StopIteration as end:
            logits: F32 = end.value
            return logits, names
        assert pieces.send(True) == names[-1]
        meanwhile()


@pytest.mark.parametrize("mode", ["arena", "page", "none"])
def test_a_sweep_that_rests_everywhere_equals_a_resident_one(tiny: Golden, any_ops: Ops, mode: CacheMode) -> None:
    reader = make_reader(4)
    resident = tiny.model(any_ops)
    sweep, chunk = tiny.ids(0)[:SWEEP], 20
    states = resident.new_states()
    expected = [resident.forward(Batch.of([(p, states)])) for p in (sweep[:-chunk], sweep[-chunk:])]
    others = Others(tiny, resident)
    for slots in (3, 20) if any_ops.name == "reference" else (1, 3, 8, 20, 28):
        model = streamed(tiny, any_ops, slots, mode, reader)
        own, beside = model.new_states(), Others(tiny, model)
        for part, logits in zip((sweep[:-chunk], sweep[-chunk:]), expected, strict=True):
            batch = Batch.of([(part, own)])
            got, names = rest_everywhere(model, batch, beside.step)
            assert np.array_equal(got, logits), (slots, len(part))
            assert not batch.failures
            assert {"mlp", "wave"} < set(names)
        while len(others.out) < len(beside.out):
            others.step()
        assert all(np.array_equal(a, b) for a, b in zip(beside.out, others.out, strict=False)), slots
        check_idle(store_of(model))
    reader.close()


def test_a_rest_inside_a_layer_is_worth_its_name(tiny: Golden, fast_ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between waves of experts and between blocks of rows; one new token comes in one piece."""
    monkeypatch.setattr("moestream.models.batch.SEEN", 1 << 20)
    reader = make_reader(2)
    model = streamed(tiny, fast_ops, 8, "arena", reader)
    layers = len(model.config.layers)
    states = model.new_states()
    _, sweep = rest_everywhere(model, Batch.of([(tiny.ids(0)[:SWEEP], states)]), lambda: None)
    mixers = [name for name in sweep if name not in ("mlp", "wave")]
    assert len(mixers) == layers * (SWEEP // 32 + 1) - 1
    assert sweep.count("wave") >= 2 * len(model.config.moe_layers)
    _, step = rest_everywhere(model, Batch.of([(tiny.ids(0)[SWEEP : SWEEP + 1], states)]), lambda: None)
    assert not step
    reader.close()


@pytest.mark.parametrize("lengths", [(70,), (33, 1, 40), (1, 31, 32, 5), (1, 1, 1)])
def test_blocks_cover_every_row_once_in_order(lengths: tuple[int, ...]) -> None:
    states = [SequenceStatesStub() for _ in lengths]
    batch = Batch.of([(list(range(n)), s) for n, s in zip(lengths, states, strict=True)])  # type: ignore[misc]
    blocks = batch.blocks()
    assert [r for block in blocks for _, rows in block for r in range(rows.start, rows.stop)] == list(
        range(sum(lengths))
    )
    for block in blocks:
        assert block[-1][1].stop - block[0][1].start <= 32 + 16
        for segment, rows in block:
            assert segment.start <= rows.start < rows.stop <= segment.start + segment.length


class SequenceStatesStub:
    length = 0
    marks: tuple[int, ...] = ()


@pytest.mark.parametrize(("before", "rows", "size"), [(0, 40, 40), (100, 80, 80), (1000, 70, 48), (9000, 70, 16)])
def test_attention_takes_fewer_rows_the_more_it_has_seen(monkeypatch: pytest.MonkeyPatch, before, rows, size) -> None:
    monkeypatch.setattr("moestream.models.batch.SEEN", 60_000)
    states = SequenceStatesStub()
    states.length = before
    segment = Batch.of([([1] * 5, SequenceStatesStub()), ([1] * rows, states)]).segments[1]  # type: ignore[list-item]
    parts = segment.parts(slice(5, 5 + rows))
    assert [r for part in parts for r in range(part.start, part.stop)] == list(range(5, 5 + rows))
    assert parts[0].stop - parts[0].start == size


def test_states_are_kept_where_they_are_wanted_in_any_block(exact_ops: Ops) -> None:
    """Marks at the borders of blocks, beside them and inside."""
    tiny = golden("qwen3_5-f32-single")
    model = tiny.model(exact_ops)
    ids = tiny.ids(0)[:SWEEP]
    marks = (1, 15, 16, 17, 32, 47, 50, SWEEP - 1)
    states = model.new_states()
    states.marks = marks
    model.forward(Batch.of([(ids, states)]))
    assert sorted(states.marked) == list(marks)
    for mark in marks:
        alone = model.new_states()
        run_chunked_into(model, ids, alone, [mark])
        for kept, expected in zip(states.marked[mark], alone.delta_states(), strict=True):
            np.testing.assert_allclose(kept.s, expected.s, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(kept.conv, expected.conv, rtol=1e-3, atol=1e-4)


def run_chunked_into(model: Model, ids: np.ndarray, states: SequenceStates, cuts: list[int]) -> None:
    for start, end in pairwise([0, *cuts]):
        model.forward(Batch.of([(ids[start:end], states)]))


def test_blocks_change_no_more_than_chunks_do(tiny: Golden, exact_ops: Ops) -> None:
    """What transformers computes, whatever the blocks."""
    model = tiny.model(exact_ops)
    logits = run_chunked(model, tiny.ids(0), [len(tiny.ids(0))])
    assert np.abs(logits - tiny.logits(0)).max() <= tiny.logits_bound


def test_reads_that_fail_during_a_rest_fail_who_needs_them_and_nobody_else(tiny: Golden, fast_ops: Ops) -> None:
    config, names = parse_config(tiny.checkpoint.config)
    tables = map_weights(tiny.checkpoint, config, names).experts
    layer = max(tables)  # later layers would carry the failure on to later rows
    victim = int(tiny.arrays["router_0"][-1][0, 0])
    bad = {tuple(tables[layer].ranges[victim, 0, :2].tolist())}
    resident = tiny.model(fast_ops)
    assert isinstance(resident.experts, ResidentExperts)
    resident.experts.fail[layer, victim] = ReadError("as on the disk")
    sweep = Batch.of([(tiny.ids(0)[:SWEEP], resident.new_states())], all_logits=True)
    expected = resident.forward(sweep)
    for slots in (2, 8, 28):
        reader = BadSectors(bad, seconds=0.0001)
        model = streamed(tiny, fast_ops, slots, "arena", reader)
        others = Others(tiny, model)
        batch = Batch.of([(tiny.ids(0)[:SWEEP], model.new_states())], all_logits=True)
        logits, _ = rest_everywhere(model, batch, others.step)
        assert [row for row, _ in batch.failures] == [row for row, _ in sweep.failures]
        assert np.array_equal(logits, expected)
        check_idle(store_of(model))
        reader.close()


@pytest.mark.parametrize("slots", [2, 8, 28])
def test_a_sweep_can_be_given_up_at_any_rest(tiny: Golden, fast_ops: Ops, slots: int) -> None:
    reader = PythonReader(threads=2)
    model = streamed(tiny, fast_ops, slots, "arena", reader)
    others = Others(tiny, model)
    sweep = tiny.ids(0)[:SWEEP]
    alone = tiny.model(fast_ops)
    expected = alone.forward(Batch.of([(sweep, alone.new_states())]))
    for stop in range(1, 40, 3):  # how many waves there are depends on the disk
        pieces = model.layers(Batch.of([(sweep, model.new_states())]))
        if len(list(islice(pieces, stop))) < stop:
            break
        pieces.send(True)
        others.step()
        pieces.close()
        check_idle(store_of(model))
    assert np.array_equal(model.forward(Batch.of([(sweep, model.new_states())])), expected)
    reader.close()


@pytest.mark.parametrize("slots", [2, 8, 28])
def test_a_sweep_at_rest_survives_that_the_store_is_reset(tiny: Golden, fast_ops: Ops, slots: int) -> None:
    """As after a step that was interrupted anywhere."""
    reader = PythonReader(threads=2)
    model = streamed(tiny, fast_ops, slots, "arena", reader)
    others = Others(tiny, model)
    sweep = tiny.ids(0)[:SWEEP]
    alone = tiny.model(fast_ops)
    expected = alone.forward(Batch.of([(sweep, alone.new_states())]))

    def interrupted() -> None:
        states = model.new_states()
        step = model.layers(Batch.of([(tiny.ids(2)[:3], states)]))
        for _ in range(3):
            next(step)
        del step  # as an exception would leave it
        store_of(model).reset()
        others.step()

    logits, _ = rest_everywhere(model, Batch.of([(sweep, model.new_states())]), interrupted)
    assert np.array_equal(logits, expected)
    check_idle(store_of(model))
    reader.close()
