"""The first lines of a forward pass: a row of the embedding table for each token.

Shape letters: T rows, V vocabulary, H hidden, n distinct tokens.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from moestream.checkpoint.encoding import Extent, MatrixSpec
from moestream.errors import ReadError
from moestream.experts.reader import ended_early
from moestream.models.batch import Batch
from moestream.ops.base import F32, U8, Ops

Embedding = Callable[[Batch], F32]
"""Rows of the batch's tokens [T, H]. A row that cannot be read goes into ``batch.failures``."""
TRIES = 2
"""Reads of a row that the disk may fail, as for experts."""


class TableOnDisk:
    """A table of which each token's row is read when it is needed: 2 KB of half a gigabyte.

    Reads go through the page cache, which keeps the rows of frequent tokens.

    Args:
        spec: The table [V, H].
        files: The checkpoint's files.
        ops: Decodes rows.

    Raises:
        ReadError: a file cannot be opened.
    """

    def __init__(self, spec: MatrixSpec, files: Sequence[Path], ops: Ops) -> None:
        self._spec, self._ops = spec, ops
        self._files: dict[int, tuple[int, Path]] = {}
        for file in {extent.file for extent in spec.parts}:
            try:
                descriptor = os.open(files[file], os.O_RDONLY)
            except OSError as error:
                raise ReadError(f"{files[file]}: cannot open: {error.strerror}") from error
            weakref.finalize(self, os.close, descriptor)
            self._files[file] = descriptor, files[file]

    def __call__(self, batch: Batch) -> F32:
        """Rows of the batch's tokens: [T, H]."""
        tokens, where = np.unique(batch.ids, return_inverse=True)  # [n], [T]
        wanted = tokens.tolist()
        for extent in self._spec.parts:
            self._announce(extent, wanted)
        layout = dataclasses.replace(self._spec.layout, rows=len(wanted))
        parts = [np.zeros(nbytes, np.uint8) for nbytes in layout.part_nbytes]
        for i, token in enumerate(wanted):
            try:
                for extent, part in zip(self._spec.parts, parts, strict=True):
                    self._read(extent, token, part.reshape(len(wanted), -1)[i])
            except ReadError as error:
                batch.failures.extend((row, error) for row in np.flatnonzero(where == i).tolist())
        return self._ops.embed(where.astype(np.int32), self._ops.matrix(layout, parts))

    def _announce(self, extent: Extent, tokens: list[int]) -> None:
        """Let the system begin with all reads, so that they do not wait for each other."""
        if hasattr(os, "posix_fadvise"):
            nbytes = extent.nbytes // self._spec.layout.rows
            for token in tokens:
                start = extent.offset + token * nbytes
                os.posix_fadvise(self._files[extent.file][0], start, nbytes, os.POSIX_FADV_WILLNEED)

    def _read(self, extent: Extent, token: int, row: U8) -> None:
        """Fill ``row`` with a token's bytes of one part."""
        descriptor, path = self._files[extent.file]
        offset, done, tries = extent.offset + token * row.size, 0, 1
        while done < row.size:
            try:
                data = os.pread(descriptor, row.size - done, offset + done)
            except OSError as error:
                tries += 1
                if error.errno == errno.EIO and tries <= TRIES:
                    continue
                raise ReadError(f"{path}: cannot read at offset {offset + done}: {error.strerror}") from error
            if not data:
                raise ended_early(path, offset + done, os.fstat(descriptor).st_size)
            row[done : done + len(data)] = np.frombuffer(data, np.uint8)
            done += len(data)
