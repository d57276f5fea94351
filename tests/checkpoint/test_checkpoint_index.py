"""Opening folders, finding matrices and vectors, and every way a folder can be wrong."""

import json
import os

import numpy as np
import pytest
from checkpoint_build import AFFINE4, BF16, module, normal, raw_safetensors, write_folder

from moestream.checkpoint import quant
from moestream.checkpoint.encoding import AFFINE_BITS, AFFINE_GROUPS, Encoding
from moestream.checkpoint.index import open_checkpoint
from moestream.checkpoint.safetensors import NewTensor
from moestream.errors import CheckpointError, HeaderError, ModelConfigError, ReadError, ShardIndexError, TensorError

Q4 = {"quantization": {"group_size": 64, "bits": 4}}
INDEX = "model.safetensors.index.json"


def bf16_folder(path, shards=1):
    tensors = [t for name in "abcd" for t in module(name, normal((4, 64)), BF16)]
    return write_folder(path / "m", tensors, shards=shards)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("align", [1, 8])
def test_round_trip(tmp_path, shards, align):
    weights = {
        "model.embed_tokens": (normal((9, 128), 1), AFFINE4),
        "model.layers.0.q": (normal((5, 128), 2), Encoding("affine", 8, 32)),
        "model.layers.0.k": (normal((5, 64), 3), BF16),
        "model.layers.0.v": (normal((5, 64), 4), Encoding("f16")),
        "lm_head": (normal((9, 128), 5), Encoding("affine", 3, 128, "f16")),
    }
    tensors = [t for name, (w, e) in weights.items() for t in module(name, w, e)]
    norm = normal(64, 6)
    tensors.append(NewTensor("model.norm.weight", "F32", (64,), [norm]))
    config = {
        "quantization": {
            "group_size": 64,
            "bits": 4,
            "model.layers.0.q": {"bits": 8, "group_size": 32},
            "lm_head": {"bits": 3, "group_size": 128, "mode": "affine"},
            "model.layers.0.k": False,
        }
    }
    path = write_folder(tmp_path / "m", tensors, config, shards, align)
    ckpt = open_checkpoint(path)
    assert ckpt.path == path
    assert ckpt.config == config
    assert ckpt.metadata == {"format": "mlx"}
    assert len(ckpt.files) == shards
    assert set(ckpt.tensors) == {t.name for t in tensors}
    for name, (w, encoding) in weights.items():
        spec = ckpt.matrix(name, *w.shape)
        assert spec.name == name
        assert spec.layout.encoding == encoding
        assert tuple(p.nbytes for p in spec.parts) == spec.layout.part_nbytes
        for got, want in zip(ckpt.read_matrix(spec), quant.encode(w, encoding), strict=True):
            np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(ckpt.read_array(ckpt.vector("model.norm.weight", (64,))), norm)


@pytest.mark.parametrize("bits", AFFINE_BITS)
@pytest.mark.parametrize("group", AFFINE_GROUPS)
def test_every_affine_form_is_recognised(tmp_path, bits, group):
    """Also without any word in config.json, as the shapes are enough."""
    encoding = Encoding("affine", bits, group)
    path = write_folder(tmp_path / "m", module("x", normal((3, 384)), encoding))
    assert open_checkpoint(path).matrix("x", 3, 384).layout.encoding == encoding


def test_matrix_without_weight_suffix_and_f32(tmp_path):
    w = normal((3, 5))
    path = write_folder(tmp_path / "m", module("x", w, Encoding("f32"), plain_suffix=""))
    ckpt = open_checkpoint(path)
    parts = ckpt.read_matrix(ckpt.matrix("x", 3, 5))
    np.testing.assert_array_equal(quant.decode(ckpt.matrix("x", 3, 5).layout, parts), w)


def test_linked_files_are_followed(tmp_path):
    path = bf16_folder(tmp_path, shards=2)
    blob = tmp_path / "blob"
    shard = path / "model-00001-of-00002.safetensors"
    shard.rename(blob)
    shard.symlink_to(blob)
    assert set(open_checkpoint(path).tensors) == {f"{n}.weight" for n in "abcd"}


def u32(name, shape):
    return NewTensor(name, "U32", shape, [np.zeros(shape, np.uint32)])


def bf(name, shape, dtype="BF16"):
    return NewTensor(name, dtype, shape, [bytes(NewTensor(name, dtype, shape, []).nbytes)])


GOOD = [u32("x.weight", (4, 16)), bf("x.scales", (4, 2)), bf("x.biases", (4, 2))]
MXFP4 = {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}

WRONG_MATRICES = {
    "missing": ([bf("y.weight", (4, 128))], {}, "tensor 'x.weight' is missing"),
    "shape": ([bf("x.weight", (128, 4))], {}, r"'x.weight' has shape \[128, 4\], expected \[4, 128\]"),
    "rank": ([bf("x.weight", (512,))], {}, r"'x.weight' has shape \[512\], expected \[4, 128\]"),
    "dtype": ([bf("x.weight", (4, 128), "I16")], {}, "'x.weight' has dtype I16 and no x.scales; supported are"),
    "fp8": ([bf("x.weight", (4, 128), "F8_E4M3")], {}, "'x.weight' has dtype F8_E4M3 and no x.scales; supported are"),
    "packed without scales": (GOOD[:1], {}, "'x.weight' has dtype U32 and no x.scales; supported are"),
    "no biases": (GOOD[:2], {}, "tensor 'x.biases' is missing, but 'x.scales' exists"),
    "no codes": (GOOD[1:], {}, "tensor 'x.weight' is missing, but 'x.scales' exists"),
    "codes dtype": ([bf("x.weight", (4, 128)), *GOOD[1:]], {}, "'x.weight' has dtype BF16, affine codes are U32"),
    "scales dtype": (
        [GOOD[0], bf("x.scales", (4, 2), "U8"), GOOD[2]],
        {},
        "'x.scales' has dtype U8, affine scales are BF16, F16 or F32",
    ),
    "two scale dtypes": (
        [*GOOD[:2], bf("x.biases", (4, 2), "F16")],
        {},
        "'x.scales' is BF16 but 'x.biases' is F16: they must agree",
    ),
    "five bits": ([u32("x.weight", (4, 20)), *GOOD[1:]], {}, r"\[4, 20\], which does not hold \[4, 128\] at any of"),
    "codes rows": ([u32("x.weight", (5, 16)), *GOOD[1:]], {}, r"\[5, 16\], which does not hold \[4, 128\] at any of"),
    "codes scalar": ([u32("x.weight", ()), *GOOD[1:]], {}, r"\[\], which does not hold \[4, 128\] at any of"),
    "group 16": ([GOOD[0], bf("x.scales", (4, 8)), GOOD[2]], {}, r"\[4, 8\], which does not hold the scales of"),
    "no groups": ([GOOD[0], bf("x.scales", (4, 0)), GOOD[2]], {}, r"\[4, 0\], which does not hold the scales of"),
    "biases shape": ([*GOOD[:2], bf("x.biases", (2, 4))], {}, r"'x.biases' has shape \[2, 4\], expected \[4, 2\]"),
    "mode": (GOOD, MXFP4, "'x' is quantised in mode 'mxfp4'; supported are"),
    "override mode": (
        GOOD,
        {"quantization": {**Q4["quantization"], "x": {"bits": 8, "group_size": 32, "mode": "mxfp8"}}},
        "'x' is quantised in mode 'mxfp8'; supported are",
    ),
    "bits differ": (
        GOOD,
        {"quantization": {"group_size": 64, "bits": 8}},
        "'x' is stored with bits 4, but config.json's quantization says 8",
    ),
    "group differs": (
        GOOD,
        {"quantization": {**Q4["quantization"], "x": {"bits": 4, "group_size": 32}}},
        "'x' is stored with group_size 64, but config.json's quantization says 32",
    ),
    "not quantised": (
        GOOD,
        {"quantization": {**Q4["quantization"], "x": False}},
        "config.json says 'x' is not quantised, but 'x.scales' exists",
    ),
}


@pytest.mark.parametrize("case", WRONG_MATRICES)
def test_wrong_matrices(case, tmp_path):
    tensors, config, message = WRONG_MATRICES[case]
    ckpt = open_checkpoint(write_folder(tmp_path / "m", tensors, config))
    with pytest.raises(TensorError, match=message):
        ckpt.matrix("x", 4, 128)


def test_override_without_mode_is_affine(tmp_path):
    config = {"quantization": {**MXFP4["quantization"], "x": {"bits": 4, "group_size": 64}}}
    assert open_checkpoint(write_folder(tmp_path / "m", GOOD, config)).matrix("x", 4, 128).layout.encoding == AFFINE4


def test_wrong_vectors(tmp_path):
    ckpt = open_checkpoint(write_folder(tmp_path / "m", [bf("v", (4,)), bf("n", (4,), "I32")]))
    for name, shape, message in [
        ("w", (4,), "tensor 'w' is missing"),
        ("n", (4,), "tensor 'n' has dtype I32, expected BF16, F16 or F32"),
        ("v", (5,), r"tensor 'v' has shape \[4\], expected \[5\]"),
    ]:
        with pytest.raises(TensorError, match=message):
            ckpt.vector(name, shape)
    with pytest.raises(TensorError, match="'n' has dtype I32"):
        ckpt.read_array(ckpt.tensors["n"])


def test_file_that_shrinks_after_opening(tmp_path):
    path = bf16_folder(tmp_path)
    ckpt = open_checkpoint(path)
    os.truncate(path / "model.safetensors", ckpt.tensors["d.weight"].offset + 100)
    with pytest.raises(ReadError, match=r"model.safetensors: file ends after 100 of 512 bytes at offset"):
        ckpt.read_matrix(ckpt.matrix("d", 4, 64))
    with pytest.raises(ReadError, match="file ends after 100 of 512"):
        ckpt.read_array(ckpt.tensors["d.weight"])
    assert ckpt.read_array(ckpt.tensors["a.weight"]).shape == (4, 64)


WRONG_CONFIGS = {
    "missing": (None, "config.json: is missing"),
    "not json": ("{", "config.json: not valid JSON"),
    "not an object": ("[]", "config.json: must be a JSON object, is list"),
    "not utf-8": (b"\xff", "config.json: not valid UTF-8"),
    "deep": ("[" * 100_000, "config.json: not valid JSON"),
    "fp8": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "quant_method 'fp8'"),
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "quant_method 'gptq'"),
    "nvfp4": (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        r"quant_method 'modelopt' \(NVFP4\) is not supported; supported are plain bf16, f16 and f32",
    ),
    "nested": (
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        "quant_method 'awq' is not supported",
    ),
    "quantization list": ({"quantization": [4]}, "quantization must be an object, is list"),
    "no bits": ({"quantization": {"group_size": 64}}, "quantization: bits must be an integer, is None"),
    "bits text": ({"quantization": {"group_size": 64, "bits": "4"}}, "quantization: bits must be an integer, is '4'"),
    "override": ({"quantization": {"group_size": 64, "bits": 4, "a": {"bits": 8}}}, "a: group_size must be an integer"),
    "mode": ({"quantization": {"group_size": 64, "bits": 4, "mode": 1}}, "mode must be a string, is 1"),
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_wrong_configs(case, tmp_path):
    content, message = WRONG_CONFIGS[case]
    path = bf16_folder(tmp_path)
    if content is None:
        (path / "config.json").unlink()
    elif isinstance(content, bytes):
        (path / "config.json").write_bytes(content)
    else:
        (path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ModelConfigError, match=message):
        open_checkpoint(path)


def test_mlx_settings_win_over_a_leftover_quant_method(tmp_path):
    config = {**Q4, "quantization_config": {"quant_method": "fp8"}}
    assert open_checkpoint(write_folder(tmp_path / "m", GOOD, config)).matrix("x", 4, 128).layout.encoding == AFFINE4


def test_wrong_folders(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: is not a folder"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        open_checkpoint(tmp_path)


OUTSIDE = ["/etc/x.safetensors", "../x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:x.safetensors"]
OUTSIDE += [".x.safetensors", "", "x.bin", "x\0.safetensors", "x\n.safetensors"]
WRONG_INDEXES = {
    **{f"name {n!r}": ({"weight_map": {"a.weight": n}}, "is not a plain *.safetensors file name") for n in OUTSIDE},
    "no map": ({}, "weight_map is missing, empty or not an object"),
    "empty map": ({"weight_map": {}}, "weight_map is missing, empty or not an object"),
    "map list": ({"weight_map": ["a"]}, "weight_map is missing, empty or not an object"),
    "file number": ({"weight_map": {"a.weight": 3}}, "file of tensor 'a.weight' must be a string, is 3"),
    "not json": ("{", "index.json: not valid JSON"),
    "duplicate": ('{"weight_map": {"a": "x", "a": "y"}}', "index.json: duplicate key 'a'"),
    "missing shard": (
        {"weight_map": {"a.weight": "model-00001-of-00002.safetensors", "z": "gone.safetensors"}},
        "1 of 2 shards are missing, first 'gone.safetensors'",
    ),
    "name too long": ({"weight_map": {"a": "x" * 5000 + ".safetensors"}}, "1 of 1 shards are missing"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_INDEXES)
def test_wrong_indexes(case, tmp_path):
    content, message = WRONG_INDEXES[case]
    path = bf16_folder(tmp_path, shards=2)
    (path / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ShardIndexError) as caught:
        open_checkpoint(path)
    assert message in str(caught.value)


def rewrite_map(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_index_and_shards_must_agree(tmp_path):
    path = bf16_folder(tmp_path, shards=2)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    good = (path / INDEX).read_text()

    rewrite_map(path, lambda m: m.update(ghost=second))
    with pytest.raises(ShardIndexError, match=f"{second}: tensor 'ghost' of {INDEX} is not in this shard"):
        open_checkpoint(path)

    (path / INDEX).write_text(good)
    rewrite_map(path, lambda m: m.pop("c.weight"))
    with pytest.raises(ShardIndexError, match=f"{first}: tensor 'c.weight' is not in {INDEX}"):
        open_checkpoint(path)

    (path / INDEX).write_text(good)
    rewrite_map(path, lambda m: m.update({"c.weight": second}))
    with pytest.raises(ShardIndexError, match=f"puts tensor 'c.weight' in '{second}', it is in '{first}'"):
        open_checkpoint(path)

    (path / INDEX).write_text(good)
    (path / second).write_bytes((path / first).read_bytes())
    with pytest.raises(ShardIndexError, match=f"tensor 'a.weight' is in both {first} and {second}"):
        open_checkpoint(path)


def test_truncated_shard_is_named(tmp_path):
    path = bf16_folder(tmp_path, shards=2)
    shard = path / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(TensorError, match=r"model-00002-of-00002.safetensors: tensor 'd.weight': .*truncated"):
        open_checkpoint(path)


def test_flipped_header_byte_is_named(tmp_path):
    path = bf16_folder(tmp_path)
    file = path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[raw.index(b'"shape"')] ^= 0x40
    file.write_bytes(raw)
    with pytest.raises(HeaderError, match=r"model.safetensors: header: not valid"):
        open_checkpoint(path)


def test_messages_never_carry_control_characters(tmp_path):
    path = bf16_folder(tmp_path)
    (path / "model.safetensors").write_bytes(raw_safetensors('{"\\u001b]0;x": {}}'))
    with pytest.raises(HeaderError) as caught:
        open_checkpoint(path)
    assert str(caught.value).isprintable()
