"""What an expert store did so far."""

from __future__ import annotations

from dataclasses import dataclass, fields

from moestream.experts.reader import ReaderCounters


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What the store did since it was made; the difference of two is one request's account."""

    bytes_read: int = 0
    """Read from disk, whole blocks for direct reads."""
    bytes_cached: int = 0
    """Served by the page cache (buffered modes on Linux)."""
    hits: int = 0
    """Experts that were kept in a slot, once per layer and step."""
    hits_ahead: int = 0
    """Experts that were in a slot because they had been read ahead of the router; not among ``hits``."""
    misses: int = 0
    """Experts that were in no slot, or still on their way."""
    failed: int = 0
    """Experts whose read failed for good."""
    stall_seconds: float = 0.0
    """Time spent waiting for reads with nothing else to do."""
    busy_seconds: float = 0.0
    """Time with at least one read in flight."""
    bytes_ahead: int = 0
    """Of the bytes read, experts that were read ahead and then asked for, landed by then or not."""
    bytes_wasted: int = 0
    """Of the bytes read, what no layer asked for."""
    stream_seconds: float = 0.0
    """Time from a router's choice to the use of its last expert, ``stall_seconds`` included."""

    def __sub__(self, before: StoreStats) -> StoreStats:
        return StoreStats(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))

    @property
    def hit_rate(self) -> float:
        """Share of experts that the cache had kept."""
        asked = self.hits + self.hits_ahead + self.misses
        return self.hits / asked if asked else 0.0

    @property
    def overlap(self) -> float:
        """Share of the disk's busy time hidden behind computation."""
        return min(1.0, max(0.0, 1.0 - self.stall_seconds / self.busy_seconds)) if self.busy_seconds else 1.0


@dataclass(slots=True)
class Account:
    """What a store counts itself; the rest is the reader's."""

    hits: int = 0
    hits_ahead: int = 0
    misses: int = 0
    failed: int = 0
    needed: int = 0
    """Bytes of experts that a layer asked for, read when it did or before."""
    bytes_ahead: int = 0
    stall: float = 0.0
    streaming: float = 0.0
    """Seconds from a router's choice to the use of its last expert, of streams that have ended or rest."""

    def stats(self, reader: ReaderCounters, running: float) -> StoreStats:
        """A snapshot; ``running`` is how long the present stream has been under way."""
        return StoreStats(
            bytes_read=reader.bytes_disk,
            bytes_cached=reader.bytes_cached,
            hits=self.hits,
            misses=self.misses,
            failed=self.failed,
            stall_seconds=self.stall,
            busy_seconds=reader.busy_seconds,
            hits_ahead=self.hits_ahead,
            bytes_ahead=self.bytes_ahead,
            bytes_wasted=max(0, reader.bytes_disk + reader.bytes_cached - self.needed),
            stream_seconds=self.streaming + running,
        )
