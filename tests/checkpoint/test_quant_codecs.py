"""The codecs: hand-made vectors, properties, and MLX as oracle."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestream.checkpoint import quant
from moestream.checkpoint.encoding import AFFINE_BITS, AFFINE_GROUPS, Encoding, MatrixLayout

ALL_AFFINE = [Encoding("affine", bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUPS]
FLOATS = [Encoding("bf16"), Encoding("f16"), Encoding("f32")]


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def encode_decode(w, encoding):
    layout = MatrixLayout(*w.shape, encoding)
    return layout, quant.decode(layout, quant.encode(w, encoding))


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (-2.5, 0xC020),
        (1.00390625, 0x3F80),  # half way between 0x3F80 and 0x3F81: even wins
        (1.01171875, 0x3F82),  # half way between 0x3F81 and 0x3F82: even wins
        (1.004, 0x3F81),  # just above half way
        (3.4e38, 0x7F80),  # beyond the largest bfloat16
        (np.inf, 0x7F80),
        (-np.inf, 0xFF80),
        (0.0, 0),
        (-0.0, 0x8000),
    ],
)
def test_bf16_rounds_to_nearest_even(value, bits):
    assert int(quant.f32_to_bf16(np.float32(value).reshape(1))[0]) == bits


def test_bf16_keeps_nan():
    patterns = np.array([0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0xFF800001], np.uint32).view(np.float32)
    assert np.isnan(quant.bf16_to_f32(quant.f32_to_bf16(patterns))).all()


def test_every_bf16_pattern_survives():
    bits = np.arange(65536, dtype=np.uint16)
    values = quant.bf16_to_f32(bits)
    finite = ~np.isnan(values)
    assert (quant.f32_to_bf16(values)[finite] == bits[finite]).all()


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (2, [1, 2, 3, 0, 3, 3, 0, 1], [0b00_11_10_01, 0b01_00_11_11]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0], [0b11_010_001, 0b0_101_100_0, 0b000_111_11]),
        (4, [1, 2, 15, 0, 7, 8, 9, 10], [0x21, 0x0F, 0x87, 0xA9]),
        (6, [1, 2, 3, 63, 0, 0, 0, 32], [0b10_000001, 0b0011_0000, 0b111111_00, 0, 0, 0b100000_00]),
        (8, [0, 255, 3, 4, 5, 6, 7, 8], [0, 255, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_bit_stream(bits, codes, packed):
    codes = np.array(codes, np.uint8)
    packed = np.array(packed, np.uint8)
    np.testing.assert_array_equal(quant.pack_codes(codes, bits), packed)
    np.testing.assert_array_equal(quant.unpack_codes(packed, bits), codes)


def test_decode_by_hand():
    """Two groups of 32 at 4 bit: scale 0.5 bias -1, scale -2 bias 3; the code of column c is c % 16."""
    layout = MatrixLayout(1, 64, Encoding("affine", 4, 32))
    codes = np.tile(np.array([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], np.uint8), 4)
    scales = np.array([0x3F00, 0xC000], "<u2").view(np.uint8)
    biases = np.array([0xBF80, 0x4040], "<u2").view(np.uint8)
    ramp = np.tile(np.arange(16), 2)
    expected = np.concatenate([ramp * 0.5 - 1, ramp * -2.0 + 3])[None]
    np.testing.assert_array_equal(quant.decode(layout, (codes, scales, biases)), expected)


def test_encode_by_hand():
    """-8..7 twice: the magnitude of the low end wins, so scale 1, bias -8, codes 0..15."""
    w = np.tile(np.arange(-8, 8, dtype=np.float32), 2)[None]
    codes, scales, biases = quant.encode(w, Encoding("affine", 4, 32))
    np.testing.assert_array_equal(codes, np.tile([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE], 2))
    assert scales.view("<u2").tolist() == [0x3F80]
    assert biases.view("<u2").tolist() == [0xC100]


def test_encode_zero_group():
    w = np.zeros((1, 64), np.float32)
    for encoding in ALL_AFFINE:
        if encoding.group <= 64:
            assert (encode_decode(w, encoding)[1] == 0).all()


@pytest.mark.parametrize("encoding", ALL_AFFINE + FLOATS, ids=lambda e: e.name)
def test_parts_match_layout_and_error_is_bounded(encoding):
    w = normal((5, 384))
    layout, got = encode_decode(w, encoding)
    assert tuple(p.size for p in quant.encode(w, encoding)) == layout.part_nbytes
    assert got.shape == w.shape
    if encoding.kind == "affine":
        grouped = w.reshape(5, -1, encoding.group)
        span = grouped.max(-1, keepdims=True) - grouped.min(-1, keepdims=True)
        levels = 2**encoding.bits - 1
        # Half a step, up to one more where the nearest code to zero stretched the scale, and bf16 scale and bias.
        bound = span / levels * 1.5 + np.abs(grouped).max(-1, keepdims=True) * 2**-7
        assert (np.abs(got.reshape(grouped.shape) - grouped) <= bound).all()
    else:
        np.testing.assert_allclose(got, w, rtol={"bf16": 2**-8, "f16": 2**-11, "f32": 0}[encoding.kind], atol=1e-7)


@pytest.mark.parametrize("scale_dtype", ["bf16", "f16", "f32"])
def test_scale_dtypes(scale_dtype):
    w = normal((3, 128), 1)
    layout, got = encode_decode(w, Encoding("affine", 8, 64, scale_dtype))
    assert layout.part_nbytes[1] == 3 * 2 * {"bf16": 2, "f16": 2, "f32": 4}[scale_dtype]
    assert np.abs(got - w).max() < {"bf16": 0.05, "f16": 0.035, "f32": 0.03}[scale_dtype]


@pytest.mark.parametrize("encoding", [*ALL_AFFINE[::4], *FLOATS], ids=lambda e: e.name)
@pytest.mark.parametrize("skew", [1, 3, 6])
def test_unaligned_parts(encoding, skew):
    w = normal((4, 256), 2)
    layout = MatrixLayout(4, 256, encoding)
    parts = quant.encode(w, encoding)
    skewed = []
    for part in parts:
        memory = np.zeros(part.size + 8, np.uint8)
        memory[skew : skew + part.size] = part
        skewed.append(memory[skew : skew + part.size])
    np.testing.assert_array_equal(quant.decode(layout, skewed), quant.decode(layout, parts))


@pytest.mark.parametrize("encoding", [*ALL_AFFINE[::4], *FLOATS], ids=lambda e: e.name)
def test_decode_rows(encoding):
    w = normal((7, 128), 3)
    layout, whole = encode_decode(w, encoding)
    rows = [6, 0, 0, 3]
    np.testing.assert_array_equal(quant.decode_rows(layout, quant.encode(w, encoding), rows), whole[rows])
    with pytest.raises(IndexError):
        quant.decode_rows(layout, quant.encode(w, encoding), [7])


@settings(max_examples=60, deadline=None)
@given(
    encoding=st.sampled_from([*ALL_AFFINE, *FLOATS]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 2**16),
)
def test_decoded_values_survive_another_round(encoding, rows, groups, scale, seed):
    """Floats are exact the second time; affine stays within one step of what was stored."""
    w = normal((rows, groups * 128), seed) * np.float32(scale)
    _, once = encode_decode(w, encoding)
    _, twice = encode_decode(once, encoding)
    if encoding.kind == "affine":
        step = np.ptp(once, axis=1, keepdims=True) / (2**encoding.bits - 1)
        bound = 1.5 * step + np.abs(once).max() * 2**-7 + 3e-7 * 2**encoding.bits
        assert (np.abs(twice - once) <= bound).all()
    else:
        np.testing.assert_array_equal(once, twice)


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (Encoding("affine", 5, 64), "bits must be one of"),
        (Encoding("affine", 4, 48), "group must be one of"),
        (Encoding("affine", 4, 128), "192 columns are not a multiple of the group 128"),
        (Encoding("affine", 4, 64, "f64"), "scale dtype must be"),
        (Encoding("mxfp4", 4, 32), "unknown encoding 'mxfp4'"),
    ],
)
def test_unsupported_encodings(encoding, message):
    with pytest.raises(ValueError, match=message):
        quant.encode(np.zeros((2, 192), np.float32), encoding)


def test_wrong_parts_and_values():
    layout = MatrixLayout(2, 64, Encoding("affine", 4, 64))
    with pytest.raises(ValueError, match=r"parts of \(64,\) bytes given, affine-4 g64 2x64 has \(64, 4, 4\)"):
        quant.decode(layout, [np.zeros(64, np.uint8)])
    with pytest.raises(ValueError, match="NaN or Inf"):
        quant.encode(np.full((1, 64), np.nan, np.float32), Encoding("affine", 4, 64))


@pytest.mark.oracle
@pytest.mark.parametrize("scale_dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("encoding", ALL_AFFINE, ids=lambda e: e.name)
def test_equals_mlx(encoding, scale_dtype):
    mx = pytest.importorskip("mlx.core")
    encoding = Encoding("affine", encoding.bits, encoding.group, scale_dtype)
    dtype = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}[scale_dtype]
    w = normal((9, 384), 5)
    w[0] = 0
    w[1] = np.abs(w[1])
    w[2, :] = 1.5
    stored = mx.array(w).astype(dtype)
    expected = mx.quantize(stored, group_size=encoding.group, bits=encoding.bits)
    values = np.array(stored.astype(mx.float32))
    parts = quant.encode(values, encoding)
    for got, want in zip(parts, expected, strict=True):
        raw = np.array(want.view(mx.uint16) if want.dtype != mx.uint32 and want.itemsize == 2 else want)
        np.testing.assert_array_equal(got, np.ascontiguousarray(raw).reshape(-1).view(np.uint8))
    wide = [expected[0], expected[1].astype(mx.float32), expected[2].astype(mx.float32)]
    exact = np.array(mx.dequantize(*wide, group_size=encoding.group, bits=encoding.bits))
    decoded = quant.decode(MatrixLayout(9, 384, encoding), parts)
    # MLX may fuse the multiply and the add, which changes the last bit.
    np.testing.assert_allclose(decoded, exact, rtol=0, atol=float(np.abs(exact).max()) * 2**-22)
