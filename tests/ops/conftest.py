"""What tests of native operators share."""

import importlib.util

import pytest

if importlib.util.find_spec("moestream._native"):
    from moestream import _native

    TIERS = _native.supported_isas()
else:
    TIERS = []  # the tests of native operators skip themselves


@pytest.fixture(params=TIERS)
def tier(request):
    """Each instruction tier this machine has."""
    before = _native.active_isa()
    _native.set_active_isa(request.param)
    yield request.param
    _native.set_active_isa(before)


@pytest.fixture
def threads():
    """Sets the number of compute threads until the test ends."""
    before = _native.threads()
    yield _native.set_threads
    _native.set_threads(before)
