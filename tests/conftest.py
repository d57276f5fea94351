"""Fixtures of all areas."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads make tiny products five times slower

import pytest
from golden_models import NAMES, Golden, golden, make_cpu_ops

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
