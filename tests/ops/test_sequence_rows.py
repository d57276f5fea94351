"""Norm, routing and the sum over experts against the float64 reference, on every instruction tier."""

import numpy as np
import pytest

_native = pytest.importorskip("moestream._native")

from moestream.ops.cpu_sequence import SequenceOps  # noqa: E402
from moestream.ops.reference import ReferenceOps  # noqa: E402

pytestmark = pytest.mark.usefixtures("tier")  # every test, on each tier

EPS = 2.0**-24
OPS, REFERENCE = SequenceOps(), ReferenceOps()


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Whatever a kernel leaves unwritten is NaN, or an impossible id."""

    def empty(shape, dtype=float, **_):
        return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else -1, dtype)

    monkeypatch.setattr(np, "empty", empty)
    monkeypatch.setattr(np, "empty_like", lambda x: empty(x.shape, x.dtype))


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 4096), (2, 15), (3, 16), (5, 33), (70, 1000), (0, 8)])
def test_rms_norm(rng, rows, width):
    x, weight = normal(rng, rows, width) * 3, normal(rng, width)
    got, want = OPS.rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6)
    assert got.shape == x.shape
    assert np.all(np.abs(got - want) <= 16 * EPS * np.abs(want))


def test_rms_norm_of_zeros_is_zero():
    assert not OPS.rms_norm(np.zeros((2, 40), np.float32), np.ones(40, np.float32), 1e-6).any()


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(
    ("rows", "experts", "k"),
    [(1, 512, 10), (3, 128, 8), (2, 1024, 16), (4, 7, 3), (2, 64, 64), (1, 1, 1), (300, 60, 4)],
)
def test_route(rng, rows, experts, k, renormalise):
    logits = normal(rng, rows, experts) * 4
    ids, weights = OPS.route(logits, k, renormalise)
    want_ids, want = REFERENCE.route(logits, k, renormalise)
    assert np.array_equal(ids, want_ids)
    assert np.all(np.abs(weights - want) <= (64 + np.log2(experts)) * EPS * want)


def test_route_ties_go_to_the_lower_index(rng):
    logits = rng.integers(0, 4, (40, 100)).astype(np.float32)
    assert np.array_equal(OPS.route(logits, 12, True)[0], REFERENCE.route(logits, 12, True)[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_route_gives_distinct_ids_for_bad_logits(rng, value):
    logits = normal(rng, 6, 50)
    logits[0] = value
    logits[1, ::2] = value
    logits[2, 49] = value
    logits[3, 0] = value
    ids, weights = OPS.route(logits, 8, True)
    assert all(len(set(row)) == 8 and min(row) >= 0 and max(row) < 50 for row in ids.tolist())
    if value != -np.inf:  # a row of finite logits beside them is untouched
        assert np.isnan(weights[:4]).any(axis=1).all()
    assert np.isfinite(weights[4:]).all()


@pytest.mark.parametrize(("rows", "k", "width"), [(1, 10, 4096), (3, 1, 5), (40, 8, 100)])
@pytest.mark.parametrize("shared", ["none", "plain", "gated"])
def test_combine(rng, rows, k, width, shared):
    x, out, weights = normal(rng, rows, width), normal(rng, rows * k, width), rng.random((rows, k), np.float32)
    extra = None if shared == "none" else normal(rng, rows, width)
    gate = normal(rng, rows, 1) * 30 if shared == "gated" else None
    got, want = OPS.combine(x, out, weights, extra, gate), REFERENCE.combine(x, out, weights, extra, gate)
    size = np.abs(x) + (weights[:, :, None] * np.abs(out.reshape(rows, k, width))).sum(axis=1)
    assert np.all(np.abs(got - want) <= (k + 8) * EPS * (size + (0 if extra is None else np.abs(extra))))


def test_wrong_shapes_are_named(rng):
    with pytest.raises(ValueError, match=r"weight must be \[8\], got \[9\]"):
        OPS.rms_norm(normal(rng, 2, 8), normal(rng, 9), 1e-6)
    with pytest.raises(ValueError, match="k must be between 1 and the number of experts 4, got 5"):
        OPS.route(normal(rng, 2, 4), 5, True)
    with pytest.raises(ValueError, match=r"expert_out must be \[6, 8\], got \[5, 8\]"):
        OPS.combine(normal(rng, 2, 8), normal(rng, 5, 8), normal(rng, 2, 3), None, None)
    with pytest.raises(TypeError):
        OPS.rms_norm(np.zeros((2, 8)), normal(rng, 8), 1e-6)
