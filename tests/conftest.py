"""Fixtures of all areas."""

from __future__ import annotations

import importlib.util

import pytest
from golden_models import NAMES, Golden, golden

from moestream.ops.base import Ops
from moestream.ops.reference import ReferenceOps


@pytest.fixture(params=NAMES)
def tiny(request: pytest.FixtureRequest) -> Golden:
    """Each golden checkpoint."""
    return golden(request.param)


@pytest.fixture(params=["reference", "cpu"])
def exact_ops(request: pytest.FixtureRequest) -> Ops:
    """Each backend with float32 activations."""
    return make_cpu_ops(exact=True) if request.param == "cpu" else ReferenceOps()


@pytest.fixture
def fast_ops() -> Ops:
    """The native backend with rounded activations."""
    return make_cpu_ops(exact=False)


def make_cpu_ops(exact: bool) -> Ops:
    """The native backend, or a skip that says why there is none."""
    if importlib.util.find_spec("moestream._native") is None:
        pytest.skip("moestream._native is not built: no C++ compiler was found at installation")
    from moestream.ops.cpu import CpuOps

    return CpuOps(exact=exact)
