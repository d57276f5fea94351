"""Disks with bad sectors and the state of a store afterwards, for tests of whole streamed models."""

import errno
import time

from moestream.experts.policy import NO_SLOT
from moestream.experts.python_reader import PythonReader
from moestream.experts.reader import FILE, OFFSET, TICKET, ReadFailure


class BadSectors(PythonReader):
    """Some ranges of it, ``bad``, cannot be read; each read takes ``seconds`` at least."""

    def __init__(self, bad=(), seconds=0.0):
        super().__init__(threads=2)
        self.bad = set(bad)
        self._seconds = seconds

    def _read(self, row, target):
        time.sleep(self._seconds)
        if (row[FILE], row[OFFSET]) in self.bad:
            target[:] = 0xA5
            return 0, ReadFailure(row[TICKET], errno.EACCES, row[FILE], row[OFFSET])
        return super()._read(row, target)


def check_slots(store):
    """Every slot is free or holds one expert, and none is held for anybody."""
    held = [slot for slot in store.policy.slot_of if slot != NO_SLOT]
    assert len(set(held)) == len(held)
    assert len(held) + store.policy.free() == store.policy.capacity
    assert not any(store.policy.pinned)


def check_idle(store):
    """The same, once what was read ahead has been dropped and all reads have ended."""
    store.claim([])
    while store.reading_anything():
        store.wait()
    check_slots(store)
