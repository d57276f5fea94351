"""Snapshots of prefixes in a folder, so that they outlive the process.

One file each: a ``.npz`` (its format checks every array by CRC) named by a hash of the tokens, in a folder named by a
hash of the model and the settings that change what the states hold. Nothing in a file is trusted: a damaged or foreign
one is deleted and the prompt is read again.

Shape letters: n tokens of a prefix, L attention layers, P tokens of a page.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moestream.models.snapshots import PAGE, Snapshot
from moestream.models.states import SequenceStates
from moestream.ops.base import I32, DeltaState, KVCache

FORMAT = 1
"""Changes when states change their meaning without changing their shape."""
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


class PrefixFiles:
    """A folder of snapshots of one model under a byte budget, least recently used out first. Not thread-safe."""

    def __init__(self, folder: Path, budget: int, like: SequenceStates) -> None:
        """Open or make the folder.

        Args:
            folder: Of this model and these settings alone.
            budget: Bytes of all files.
            like: Empty states of the model; a file whose arrays do not fit them is refused.
        """
        self._folder = folder
        self._budget = budget
        self._like = like
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.part"):
            left.unlink(missing_ok=True)

    def tokens(self) -> Iterator[I32]:
        """The prefixes there are, least recently used first."""
        for path in self._oldest_first():
            try:
                with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                    tokens = _checked(arrays["tokens"], np.int32, 1)
                if path != self._path(tokens):
                    raise ValueError("its name does not belong to its tokens")
            except _UNREADABLE as error:
                self._refuse(path, error)
                continue
            yield tokens

    def load(self, tokens: I32) -> Snapshot | None:
        """The snapshot of a prefix; None if its file is gone or damaged."""
        path = self._path(tokens)
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                if not np.array_equal(arrays["tokens"], tokens):
                    raise ValueError("it holds other tokens")
                snapshot = self._snapshot(len(tokens), arrays)
            path.touch()
        except FileNotFoundError:
            return None
        except _UNREADABLE as error:
            self._refuse(path, error)
            return None
        return snapshot

    def save(self, tokens: I32, snapshot: Snapshot) -> bool:
        """Write a snapshot unless it is there; False if it is larger than the budget or the disk refuses."""
        path = self._path(tokens)
        nbytes = snapshot.deltas_nbytes + sum(page.nbytes for page in snapshot.pages) + tokens.nbytes
        if path.exists():
            return True
        if nbytes > self._budget:
            return False
        part = path.with_suffix(".part")
        try:
            self._make_room(nbytes)
            with part.open("wb") as file:
                arrays: dict[str, Any] = {f"page{i}": page for i, page in enumerate(snapshot.pages)}
                for i, delta in enumerate(snapshot.deltas):
                    arrays |= {f"conv{i}": delta.conv, f"s{i}": delta.s}
                np.savez(file, tokens=tokens, **arrays)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            warnings.warn(f"{path}: a prefix could not be kept on disk: {error}", stacklevel=2)
            return False
        return True

    def _snapshot(self, length: int, arrays: np.lib.npyio.NpzFile) -> Snapshot:
        caches = [c for c in self._like.layers if isinstance(c, KVCache)]
        pages = []
        for i, start in enumerate(range(0, length if caches else 0, PAGE)):
            heads, _, dim = caches[0].k.shape
            shape = (len(caches), 2, heads, min(PAGE, length - start), dim)
            pages.append(_checked(arrays[f"page{i}"], caches[0].k.dtype, shape))
        deltas = [
            DeltaState(
                _checked(arrays[f"conv{i}"], like.conv.dtype, like.conv.shape),
                _checked(arrays[f"s{i}"], like.s.dtype, like.s.shape),
            )
            for i, like in enumerate(self._like.delta_states())
        ]
        return Snapshot(length, tuple(pages), tuple(deltas))

    def _path(self, tokens: I32) -> Path:
        return self._folder / f"{hashlib.blake2b(tokens.tobytes(), digest_size=16).hexdigest()}.npz"

    def _oldest_first(self) -> list[Path]:
        return [path for _, path in sorted((path.stat().st_mtime, path) for path in self._folder.glob("*.npz"))]

    def _make_room(self, nbytes: int) -> None:
        files = self._oldest_first()
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total + nbytes <= self._budget:
                return
            total -= path.stat().st_size
            path.unlink()

    def _refuse(self, path: Path, error: Exception) -> None:
        warnings.warn(f"{path}: not a usable prefix ({error}); it is deleted", stacklevel=3)
        path.unlink(missing_ok=True)


def _checked(array: np.ndarray, dtype: np.dtype | type, shape: int | tuple[int, ...]) -> np.ndarray:
    """The array, if it is what a state needs.

    Raises:
        ValueError: another type or shape (or number of dimensions).
    """
    if array.dtype != dtype or (array.shape != shape if isinstance(shape, tuple) else array.ndim != shape):
        raise ValueError(f"an array is {array.dtype} {list(array.shape)}")
    return array
