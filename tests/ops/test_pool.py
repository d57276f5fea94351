"""The compute threads: how many there may be, and a change of their number while another thread computes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

native = pytest.importorskip("moestream._native", reason="the native kernels are not built")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = native.threads()
    yield native.set_threads
    native.set_threads(before)


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_refuses_a_number_of_threads(set_threads: Callable[[int], None], count: int) -> None:
    set_threads(3)
    with pytest.raises(ValueError, match=f"between 1 and 1024, got {count}"):
        set_threads(count)
    assert native.threads() == 3


def test_number_of_threads_changes_while_another_thread_computes(tmp_path: Path) -> None:
    """The results stay right, and no freed memory is touched."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    check = tmp_path / "check"
    sources = [ROOT / "tests/ops/pool_check.cpp", ROOT / "native/cpu/pool.cpp"]
    flags = ["-std=c++20", "-O1", "-pthread", "-fsanitize=address", "-I", ROOT / "native", "-o", check]
    built = subprocess.run([compiler, *flags, *sources], check=False, capture_output=True, text=True, timeout=120)
    if built.returncode != 0 and "asan" in built.stderr:
        pytest.skip("no AddressSanitizer")
    assert built.returncode == 0, built.stderr
    run = subprocess.run([check], check=False, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
