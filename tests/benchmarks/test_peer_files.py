"""What the peers are given to run: routers that prefer some experts, and a GGUF file of our geometry."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from peer_router import BLOCK, PeerRouter, Replay, foreseen, lru_hit_rate, shares

from moestream.bench.demand import token_demand
from moestream.checkpoint.geometry import geometry
from moestream.checkpoint.index import open_checkpoint
from moestream.checkpoint.synthetic import write_synthetic
from moestream.models.registry import parse_config
from moestream.models.weights import map_weights

gguf = pytest.importorskip("gguf", reason="GGUF files are written and read with the gguf package: pip install gguf")
peer_gguf = pytest.importorskip("peer_gguf")

SHAPES = ("tiny-qwen3", "tiny-qwen3.5")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    for shape in SHAPES:
        peer_gguf.write_gguf(folder / f"{shape}.gguf", shape, None, "q4_0", "skewed")
    return {shape: folder / f"{shape}.gguf" for shape in SHAPES}


def read(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.dequantize(t.data, t.tensor_type).copy() for t in gguf.GGUFReader(path).tensors}


def top(logits: np.ndarray, k: int) -> list[set[int]]:
    return [set(row) for row in np.argsort(-logits, axis=1)[:, :k].tolist()]


# ------------------------------------------------------------------------------------------------ routing


def test_shares_are_those_of_k_choices_and_fall() -> None:
    share = shares(512, 10, 1.24)
    assert share.sum() == pytest.approx(10, rel=1e-6)
    assert (np.diff(share) < 0).all()
    assert (share < 1).all()


def test_skewed_routing_has_the_published_hit_rates_and_uniform_has_none() -> None:
    skewed = PeerRouter(512, 10, 4096, "skewed").trace(0, 900)
    assert lru_hit_rate(skewed, 64) == pytest.approx(0.67, abs=0.04)
    assert lru_hit_rate(skewed, 128) == pytest.approx(0.80, abs=0.04)
    uniform = PeerRouter(512, 10, 4096, "uniform").trace(0, 900)
    assert lru_hit_rate(uniform, 64) == pytest.approx(64 / 512, abs=0.03)


def test_a_replay_hands_out_the_trace_row_by_row_and_starts_again() -> None:
    router = PeerRouter(16, 3, 256)
    replay = Replay(router, layers=2, rows=10)
    trace = router.trace(1, 10)
    assert np.array_equal(replay.ids(1, 4), trace[:4])
    assert np.array_equal(replay.ids(1, 6), trace[4:])
    assert np.array_equal(replay.ids(1, 2), trace[:2])
    assert np.array_equal(replay.ids(0, 2), router.trace(0, 10)[:2])


# ------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize("shape", SHAPES)
def test_the_file_has_every_tensor_of_the_geometry_in_its_shape(files, shape: str) -> None:
    config = geometry(shape)
    stored = {t.name: t for t in gguf.GGUFReader(files[shape]).tensors}
    plan = {t.name: t for t in peer_gguf.tensors(config)}
    assert stored.keys() == plan.keys()
    for name, tensor in plan.items():
        assert tuple(reversed(stored[name].shape.tolist())) == tensor.shape, name
        expected = gguf.GGMLQuantizationType.Q4_0 if tensor.quantized else gguf.GGMLQuantizationType.F32
        assert stored[name].tensor_type == expected, name
        assert stored[name].n_bytes == tensor.nbytes("q4_0"), name


@pytest.mark.parametrize("shape", SHAPES)
def test_settings_are_those_of_the_geometry(files, shape: str) -> None:
    config = geometry(shape)
    text = config.get("text_config", config)
    reader = gguf.GGUFReader(files[shape])
    name = reader.fields["general.architecture"].contents()
    assert name == {"tiny-qwen3": "qwen3moe", "tiny-qwen3.5": "qwen35moe"}[shape]
    assert reader.fields[f"{name}.expert_count"].contents() == text["num_experts"]
    assert reader.fields[f"{name}.expert_used_count"].contents() == text["num_experts_per_tok"]
    assert reader.fields[f"{name}.block_count"].contents() == text["num_hidden_layers"]
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == text["vocab_size"]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_work_of_a_token_equals_that_of_our_checkpoint(tmp_path, shape: str) -> None:
    write_synthetic(tmp_path / shape, shape)
    checkpoint = open_checkpoint(tmp_path / shape)
    config, names = parse_config(checkpoint.config)
    ours = token_demand(config, map_weights(checkpoint, config, names), config.moe.active)
    work = peer_gguf.token_work(geometry(shape), "q4_0")
    assert (work.flops, work.head_flops) == (ours.flops, ours.head_flops)
    assert work.expert_bytes == ours.expert_bytes  # 4.5 bits a weight on both sides
    assert set(asdict(work)) == {"dense_bytes", "expert_bytes", "flops", "head_flops"}


@pytest.mark.parametrize("shape", SHAPES)
def test_routers_of_the_file_choose_what_the_traces_promise(files, shape: str) -> None:
    weights = read(files[shape])
    router = peer_gguf.peer_router(geometry(shape), "skewed")
    embedding = weights["token_embd.weight"]
    codes = np.ascontiguousarray(embedding[:, BLOCK : router.reserved])
    for layer in (0, 2):
        chosen = top(embedding @ weights[f"blk.{layer}.ffn_gate_inp.weight"].T, router.k)
        promised = [set(row) for row in router.choose(layer, codes).tolist()]
        assert sum(a == b for a, b in zip(chosen, promised, strict=True)) > 0.99 * len(chosen)  # 1/7 is rounded
    share = np.sort(np.bincount([e for row in chosen for e in row], minlength=16))[::-1] / len(chosen)
    assert share == pytest.approx(shares(16, 3, 1.24), abs=0.12)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_layer_writes_to_the_channels_that_routers_read(files, shape: str) -> None:
    reserved = peer_gguf.peer_router(geometry(shape), "skewed").reserved
    writers = {n: w for n, w in read(files[shape]).items() if any(f".{p}." in n for p in peer_gguf.WRITE_HIDDEN)}
    assert len(writers) >= 2 * geometry(shape).get("text_config", geometry(shape))["num_hidden_layers"]
    for name, weight in writers.items():
        assert not weight[..., :reserved, :].any(), name
        assert weight[..., reserved:, :].any(axis=-1).all(), name


def test_another_routing_changes_only_the_routers(files, tmp_path) -> None:
    path = tmp_path / "copy.gguf"
    path.write_bytes(files["tiny-qwen3"].read_bytes())
    before = read(path)
    peer_gguf.set_routing(path, "tiny-qwen3", None, "q4_0", "uniform")
    after = read(path)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"blk.{layer}.ffn_gate_inp.weight" for layer in range(3)}


@pytest.mark.parametrize(("kind", "block"), [("q4_0", 32), ("q4_k", 256)])
def test_random_blocks_are_centred_and_have_the_deviation_asked_for(kind: str, block: int) -> None:
    weights = gguf.dequantize(peer_gguf._pool(kind, 0.02)[:4096], peer_gguf.TYPES[kind])
    assert weights.shape == (4096, block)
    assert np.abs(weights.mean()) < 0.0005
    assert weights.std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("kind", ["q4_0", "q4_k"])
def test_embeddings_hold_the_constant_and_unit_codes(kind: str) -> None:
    weights, size = peer_gguf.BYTES_OF[kind]
    blocks = peer_gguf._pool(kind, 1.0)[: 200 * 512 // weights].reshape(200, -1, size).copy()
    peer_gguf._set_constant(blocks, kind, 256)
    rows = gguf.dequantize(blocks.reshape(200, -1), peer_gguf.TYPES[kind])
    assert rows[:, :BLOCK] == pytest.approx(peer_gguf.CONSTANT[kind], rel=1e-3)
    assert rows[:, BLOCK:256].std() == pytest.approx(1, rel=0.02)


def test_a_shape_that_blocks_do_not_divide_is_refused(tmp_path) -> None:
    with pytest.raises(SystemExit, match=r"q4_k.*256"):
        peer_gguf.write_gguf(tmp_path / "x.gguf", "tiny-qwen3", None, "q4_k", "skewed")
    assert not list(tmp_path.iterdir())


def test_guesses_at_a_trace_come_true_at_the_recall() -> None:
    router = PeerRouter(num_experts=128, k=8, hidden=512)
    trace = router.trace(0, 3000)
    guessed = foreseen(trace, 0.7, seed=1)
    right = [len(set(row) & set(true)) / 8 for row, true in zip(guessed.tolist(), trace.tolist(), strict=True)]
    assert 0.68 <= sum(right) / len(right) <= 0.8  # popular experts are right by chance too
    assert (guessed[:, 0] == trace[:, 0]).mean() > (guessed[:, -1] == trace[:, -1]).mean() + 0.3
    replay = Replay(router, layers=1, rows=10)
    seen = replay.predict(0, 4), replay.predict(0, 4)
    assert (seen[0] == seen[1]).all()  # guessing changes no trace
    assert (replay.ids(0, 4) == trace[:4]).all()
