"""Readers under test."""

from __future__ import annotations

import importlib.util

import pytest

from moestream.experts.native_reader import NativeReader
from moestream.experts.python_reader import PythonReader


def _make(name):
    if name == "python":
        return PythonReader(threads=3)
    if importlib.util.find_spec("moestream._native") is None:
        pytest.skip("moestream._native is not built: no C++ compiler was found at installation")
    return NativeReader(threads=4)


@pytest.fixture(params=["native", "python"])
def reader(request):
    reader = _make(request.param)
    yield reader
    reader.close()


@pytest.fixture
def native_reader():
    reader = _make("native")
    yield reader
    reader.close()
