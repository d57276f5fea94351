"""Gated delta-net against the float64 reference: every instruction tier, token by token and in chunks."""

import numpy as np
import pytest

_native = pytest.importorskip("moestream._native")

from moestream.ops.base import DeltaNetParams, DeltaState  # noqa: E402
from moestream.ops.cpu_sequence import SequenceOps  # noqa: E402
from moestream.ops.reference import ReferenceOps  # noqa: E402

pytestmark = pytest.mark.usefixtures("tier")  # every test, on each tier

EPS = 2.0**-24
OPS, REFERENCE = SequenceOps(), ReferenceOps()

# Key heads, value heads, key dim, value dim.
GEOMETRIES = [(2, 2, 32, 64), (2, 4, 64, 32), (1, 4, 36, 20), (1, 2, 128, 128)]
TOKENS = [1, 2, 3, 5, 17, 64, 65, 150]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    monkeypatch.setattr(np, "empty_like", lambda x: np.full(x.shape, np.nan, x.dtype))


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def make_params(rng, geometry, decay=1.0, width=4, eps=1.0):
    """A large `eps` keeps the closing norm from magnifying errors, so that bounds need no condition number."""
    hk, hv, dk, dv = geometry
    conv = normal(rng, 2 * hk * dk + hv * dv, width) / np.float32(np.sqrt(width))
    a = -decay * np.exp(normal(rng, hv))
    return DeltaNetParams(hk, hv, dk, dv, eps, conv, a.astype(np.float32), normal(rng, hv), 1 + normal(rng, dv) / 4)


def make_state(p):
    rng = np.random.default_rng(3)
    return DeltaState(normal(rng, p.conv.shape[1] - 1, len(p.conv)), normal(rng, p.value_heads, p.key_dim, p.value_dim))


def make_inputs(rng, p, tokens):
    hv = p.value_heads
    return normal(rng, tokens, len(p.conv)), normal(rng, tokens, hv * p.value_dim), *normal(rng, 2, tokens, hv)


def check(p, inputs, factor):
    """Compares outputs and state; errors are measured against the largest entry of S and of the values."""
    state, want_state = make_state(p), make_state(p)
    got, want = OPS.delta_net(*inputs, p, state), REFERENCE.delta_net(*inputs, p, want_state)
    assert np.array_equal(state.conv, want_state.conv)
    size = max(np.abs(want_state.s).max(), np.abs(make_state(p).s).max())
    z = inputs[1].astype(np.float64)
    gate = np.abs(z / (1 + np.exp(-z))) * np.abs(np.tile(p.norm, p.value_heads))
    assert np.abs(state.s - want_state.s).max() <= factor * EPS * size
    assert np.all(np.abs(got - want) <= factor / 4 * EPS * size * gate + 32 * EPS * np.abs(want))


@pytest.mark.parametrize("decay", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_delta_net(rng, geometry, tokens, decay):
    p = make_params(rng, geometry, decay)
    check(p, make_inputs(rng, p, tokens), 16)


@pytest.mark.parametrize("decay", [1e-4, 1.0])
def test_thousand_tokens(rng, decay):
    p = make_params(rng, GEOMETRIES[1], decay)
    check(p, make_inputs(rng, p, 1000), 16 if decay == 1.0 else 64)  # without decay, rounding adds up


def test_weak_decay_after_strong(rng):
    """Sums of log decays near -1000 must not swallow the small ones that follow them."""
    p = make_params(rng, GEOMETRIES[1], 1.0)
    inputs = make_inputs(rng, p, 64)
    a = inputs[3]
    a[:] = -8
    a[::16] = 400
    check(p, inputs, 16)


@pytest.mark.parametrize("tokens", [3, 40])
def test_model_epsilon(rng, tokens):
    p = make_params(rng, GEOMETRIES[3], eps=1e-6)
    check(p, make_inputs(rng, p, tokens), 128)


@pytest.mark.parametrize("width", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_conv_widths(rng, width, tokens):
    p = make_params(rng, GEOMETRIES[0], width=width)
    check(p, make_inputs(rng, p, tokens), 16)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pieces_equal_one_piece(rng, geometry):
    p = make_params(rng, geometry, decay=0.3)
    inputs = make_inputs(rng, p, 230)
    whole, pieces = make_state(p), make_state(p)
    want = OPS.delta_net(*inputs, p, whole)
    got, at = [], 0
    for size in (1, 2, 17, 1, 130, 64, 15):
        got.append(OPS.delta_net(*(x[at : at + size] for x in inputs), p, pieces))
        at += size
    assert np.array_equal(whole.conv, pieces.conv)
    size = max(np.abs(whole.s).max(), 1)
    assert np.abs(pieces.s - whole.s).max() <= 32 * EPS * size
    assert np.abs(np.concatenate(got) - want).max() <= 64 * EPS * size * np.abs(inputs[1]).max()


@pytest.mark.parametrize("tokens", [1, 150])
def test_threads_do_not_show(rng, threads, tokens):
    p = make_params(rng, (2, 8, 64, 64))
    inputs = make_inputs(rng, p, tokens)
    results = []
    for count in (1, 2, 5):
        threads(count)
        state = make_state(p)
        results.append((OPS.delta_net(*inputs, p, state), state.s))
    for out, s in results[1:]:
        assert np.array_equal(out, results[0][0])
        assert np.array_equal(s, results[0][1])


@pytest.mark.parametrize("tokens", [1, 70])
def test_an_earlier_call_leaves_no_trace(rng, tokens):
    """Kernels reuse scratch memory; NaN of a failed request must not reach the next one."""
    p = make_params(rng, GEOMETRIES[2])
    inputs = make_inputs(rng, p, tokens)
    want = OPS.delta_net(*inputs, p, make_state(p))
    bad = [np.full((150, x.shape[1]), np.nan, np.float32) for x in inputs]
    assert np.isnan(OPS.delta_net(*bad, p, make_state(p))).all()
    assert np.array_equal(OPS.delta_net(*inputs, p, make_state(p)), want)


def test_extreme_gates_stay_finite(rng):
    p = make_params(rng, GEOMETRIES[0], decay=1e6)
    for tokens in (2, 70):
        u, z, b, a = make_inputs(rng, p, tokens)
        state = make_state(p)
        assert np.isfinite(OPS.delta_net(u * 100, z * 100, b * 1000, a * 1000, p, state)).all()
        assert np.isfinite(state.s).all()


def test_wrong_shapes_are_named(rng):
    p = make_params(rng, GEOMETRIES[0])
    u, z, b, a = make_inputs(rng, p, 3)
    state = make_state(p)
    with pytest.raises(ValueError, match=r"u must be \[3, 256\], got \[3, 250\]"):
        OPS.delta_net(np.zeros((3, 250), np.float32), z, b, a, p, state)
    with pytest.raises(ValueError, match=r"state.conv must be \[3, 256\], got \[2, 256\]"):
        OPS.delta_net(u, z, b, a, p, DeltaState(state.conv[1:], state.s))
