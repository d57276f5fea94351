"""Numpy codecs: the definition of every encoding.

A kernel is right when it agrees with ``decode``. Affine is MLX's layout and recipe: codes are a little-endian bit
stream along a row, lowest bits first, and ``value = scale * code + bias`` in float32 per group of columns.

Shape letters: N rows, K columns, G groups of a row (K / group).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moestream.checkpoint.encoding import AFFINE_BITS, AFFINE_GROUPS, FLOAT_BYTES, Encoding, MatrixLayout

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]


def bf16_to_f32(bits: U16) -> F32:
    """Exact values of bfloat16 bit patterns, any shape."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: F32) -> U16:
    """Bfloat16 bit patterns of float32 values, any shape: round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    # A NaN must not be carried into Inf by rounding: truncate it and set the quiet bit.
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def floats_from_bytes(raw: U8, dtype: str) -> F32:
    """Decode a 1-D byte array (any alignment) of ``bf16``, ``f16`` or ``f32`` values to float32, 1-D."""
    if dtype == "bf16":
        return bf16_to_f32(raw.view("<u2"))
    return raw.view("<f2" if dtype == "f16" else "<f4").astype(np.float32)


def floats_to_bytes(values: F32, dtype: str) -> U8:
    """Encode float32 values as 1-D bytes of ``bf16``, ``f16`` or ``f32``, rounding to nearest even."""
    if dtype == "bf16":
        stored: npt.NDArray[Any] = f32_to_bf16(values).astype("<u2")
    else:
        with np.errstate(over="ignore"):  # beyond float16 is Inf, as in every cast
            stored = values.astype("<f2" if dtype == "f16" else "<f4")
    return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)


def unpack_codes(raw: U8, bits: int) -> U8:
    """Codes of a little-endian bit stream: bytes [n * bits / 8] -> [n], n a multiple of 8."""
    if bits == 8:
        return raw
    if bits == 4:
        codes = np.empty((raw.size, 2), np.uint8)
        np.bitwise_and(raw, 15, out=codes[:, 0])
        np.right_shift(raw, 4, out=codes[:, 1])
        return codes.reshape(-1)
    words = np.zeros((raw.size // bits, 8), np.uint8)
    words[:, :bits] = raw.reshape(-1, bits)
    word = words.view("<u8")[:, 0]  # 8 codes each
    codes = np.empty((word.size, 8), np.uint8)
    mask = np.uint64((1 << bits) - 1)
    for i in range(8):
        codes[:, i] = (word >> np.uint64(i * bits)) & mask
    return codes.reshape(-1)


def pack_codes(codes: U8, bits: int) -> U8:
    """Inverse of ``unpack_codes``: codes [n] -> bytes [n * bits / 8], n a multiple of 8."""
    eights = codes.reshape(-1, 8)
    word = np.zeros(eights.shape[0], "<u8")
    for i in range(8):
        word |= eights[:, i].astype(np.uint64) << np.uint64(i * bits)
    return np.ascontiguousarray(word.view(np.uint8).reshape(-1, 8)[:, :bits]).reshape(-1)


def check_encoding(encoding: Encoding, cols: int) -> None:
    """Check that rows of ``cols`` values can be stored in ``encoding``.

    Raises:
        ValueError: unsupported bits, group or scale dtype, or ``cols`` is not a multiple of the group.
    """
    if encoding.kind != "affine":
        if encoding.kind not in FLOAT_BYTES:
            raise ValueError(f"unknown encoding {encoding.kind!r}: use affine, bf16, f16 or f32")
        return
    if encoding.bits not in AFFINE_BITS:
        raise ValueError(f"affine bits must be one of {AFFINE_BITS}, got {encoding.bits}")
    if encoding.group not in AFFINE_GROUPS:
        raise ValueError(f"affine group must be one of {AFFINE_GROUPS}, got {encoding.group}")
    if encoding.scale_dtype not in FLOAT_BYTES:
        raise ValueError(f"scale dtype must be bf16, f16 or f32, got {encoding.scale_dtype!r}")
    if cols % encoding.group:
        raise ValueError(f"{cols} columns are not a multiple of the group {encoding.group}")


def decode(layout: MatrixLayout, parts: Sequence[U8]) -> F32:
    """Decode a whole matrix.

    Args:
        layout: shape and encoding of the matrix.
        parts: one 1-D uint8 array per entry of ``layout.part_nbytes``, contiguous, any alignment.

    Returns:
        float32 [N, K]; affine products and sums are rounded in float32.

    Raises:
        ValueError: the parts do not have the sizes the layout asks for, or the encoding is unsupported.
    """
    return decode_rows(layout, parts, None)


def decode_rows(layout: MatrixLayout, parts: Sequence[U8], rows: npt.ArrayLike | None) -> F32:
    """Decode some rows of a matrix, as an embedding look-up does.

    Args:
        layout: shape and encoding of the matrix.
        parts: as for ``decode``.
        rows: integer row numbers [R], in any order, repeats allowed; None for all.

    Returns:
        float32 [R, K].

    Raises:
        ValueError: as for ``decode``.
        IndexError: a row number is outside the matrix.
    """
    e = layout.encoding
    check_encoding(e, layout.cols)
    sizes = tuple(int(part.size) for part in parts)
    if sizes != layout.part_nbytes:
        raise ValueError(f"parts of {sizes} bytes given, {e.name} {layout.rows}x{layout.cols} has {layout.part_nbytes}")
    picked = [_take_rows(part, layout.rows, rows) for part in parts]
    if e.kind != "affine":
        return floats_from_bytes(picked[0], e.kind).reshape(-1, layout.cols)
    groups = layout.cols // e.group
    codes = unpack_codes(picked[0], e.bits).reshape(-1, groups, e.group)
    out = codes.astype(np.float32)  # [N, G, group]
    out *= floats_from_bytes(picked[1], e.scale_dtype).reshape(-1, groups, 1)
    out += floats_from_bytes(picked[2], e.scale_dtype).reshape(-1, groups, 1)
    return out.reshape(-1, layout.cols)


def _take_rows(part: U8, total: int, rows: npt.ArrayLike | None) -> U8:
    """Bytes of the given rows of one part, 1-D."""
    if rows is None:
        return part.reshape(-1)
    return part.reshape(total, -1)[np.asarray(rows, dtype=np.int64)].reshape(-1)


def encode(w: F32, encoding: Encoding) -> tuple[U8, ...]:
    """Encode a matrix; for affine this is MLX's recipe bit for bit.

    Args:
        w: float32 [N, K].
        encoding: how to store it.

    Returns:
        One 1-D uint8 array per part: (codes, scales, biases) for affine, (values,) for floats.

    Raises:
        ValueError: the encoding is unsupported, K is not a multiple of the group, or an affine input is not finite.
    """
    check_encoding(encoding, w.shape[-1])
    w = np.ascontiguousarray(w, dtype=np.float32)
    if encoding.kind != "affine":
        return (floats_to_bytes(w, encoding.kind),)
    if not np.isfinite(w).all():
        raise ValueError("affine encoding needs finite values, the matrix holds NaN or Inf")
    grouped = w.reshape(-1, encoding.group)  # [N * G, group]
    scale, bias = _affine_scales(grouped, encoding.bits)
    levels = np.float32((1 << encoding.bits) - 1)
    codes = np.clip(np.rint((grouped - bias) / scale), np.float32(0), levels).astype(np.uint8)
    return (
        pack_codes(codes.reshape(-1), encoding.bits),
        floats_to_bytes(scale, encoding.scale_dtype),
        floats_to_bytes(bias, encoding.scale_dtype),
    )


def _affine_scales(grouped: F32, bits: int) -> tuple[F32, F32]:
    """Unrounded scale and bias of each group, [N * G, 1] each, as mlx.core.quantize chooses them.

    The end of the range with the larger magnitude becomes the bias and is stored exactly; a group whose nearest code
    to zero is 0 has bias 0.
    """
    low = grouped.min(axis=1, keepdims=True)
    high = grouped.max(axis=1, keepdims=True)
    flip = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / np.float32((1 << bits) - 1), np.float32(1e-7))
    scale = np.where(flip, scale, -scale)
    edge = np.where(flip, low, high)
    q0 = np.rint(edge / scale)
    nonzero = q0 != 0
    scale = np.where(nonzero, edge / np.where(nonzero, q0, np.float32(1)), scale)
    return scale, np.where(nonzero, edge, np.float32(0))
