"""The measured account of one request."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from moestream.config import CacheMode, format_size

FinishReason = Literal["stop", "length", "error", "cancelled"]


@dataclass(frozen=True, slots=True)
class IoCounters:
    """Counters of the expert store since it started. Differences of two are what a step did."""

    bytes_read: float = 0.0
    """Bytes delivered from the disk or the page cache."""
    page_cache_bytes: float = 0.0
    """The part of them that came from the page cache."""
    hits: float = 0.0
    """Experts that were kept in memory when a layer asked for them."""
    misses: float = 0.0
    """Experts that had to be read."""
    busy_seconds: float = 0.0
    """Time during which at least one read was under way."""
    stall_seconds: float = 0.0
    """Time during which the computation waited for reads."""
    hits_ahead: float = 0.0
    """Experts that had been read before the router chose them; not among the hits."""
    bytes_ahead: float = 0.0
    """Of the bytes read, those read ahead of the router that it then chose."""
    bytes_wasted: float = 0.0
    """Of the bytes read, those read ahead that nobody asked for."""

    def __sub__(self, other: IoCounters) -> IoCounters:
        return IoCounters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def __add__(self, other: IoCounters) -> IoCounters:
        return IoCounters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def scaled(self, share: float) -> IoCounters:
        """The part that belongs to one request."""
        return IoCounters(*(getattr(self, f.name) * share for f in fields(self)))


@dataclass(slots=True)
class Usage:
    """What one request has used so far; times are of ``time.perf_counter``."""

    added: float
    """When the request was handed in."""
    started: float | None = None
    """When its first prompt chunk was scheduled."""
    first: float | None = None
    """When its first token was chosen."""
    last: float | None = None
    """When its latest token was chosen."""
    io: IoCounters = field(default_factory=IoCounters)


@dataclass(frozen=True, slots=True)
class Setup:
    """The part of a receipt that is the same for every request of a loaded model."""

    backend: str
    cache: CacheMode
    exact: bool
    experts_native: int
    """Experts per token the model was trained with."""
    experts_used: int
    slots: int
    """Experts the arena can hold; 0 without an arena."""
    slot_bytes: int
    budget: int
    """Bytes the whole process may take."""
    threads: int
    prefill_chunk: int = 512
    """Prompt tokens of one sweep over the layers, at most."""
    prefetch: Literal["auto", "off"] = "auto"
    """Whether experts may be read before their router has chosen them."""
    measured: str | None = None
    """Day of the stored plan (``moestream plan --measure``) that chose cache and slots; None: flags or defaults did."""

    @property
    def lossy(self) -> tuple[str, ...]:
        """Settings that change what the model computes."""
        if self.experts_used == self.experts_native:
            return ()
        return (f"active-experts {self.experts_used} of {self.experts_native}",)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one request cost.

    When several requests share a step, an expert is read once for all of them; the step's reads, hits, misses and
    waits are then divided in proportion to the rows (tokens) each request had in it. Times are not divided.
    """

    prompt_tokens: int
    cached_tokens: int
    """Tokens of the prompt whose states the prefix cache had."""
    new_tokens: int
    finish_reason: FinishReason
    ttft_s: float | None
    """From handing the request in (waiting for others included) to its first token; None if there was none."""
    prefill_tok_s: float | None
    """Of the tokens that were not cached."""
    decode_tok_s: float | None
    """After the first token; None with fewer than two tokens."""
    bytes_read: int
    page_cache_bytes: int
    hits: int
    misses: int
    io_overlap: float | None
    """Share of the time in which reads were under way that was hidden behind computation; None without reads."""
    stall_s: float
    """Time the computation waited for reads."""
    hits_ahead: int
    """Experts that had been read before the router chose them; not among the hits."""
    bytes_ahead: int
    """Of the bytes read, those read ahead of the router that it then chose."""
    bytes_wasted: int
    """Of the bytes read, those read ahead that nobody asked for."""
    peak_rss: int
    """Largest resident size of the process so far."""
    setup: Setup

    @property
    def hit_rate(self) -> float | None:
        """Share of experts that were kept in memory when asked for; None if none was asked for."""
        asked = self.hits + self.hits_ahead + self.misses
        return self.hits / asked if asked else None

    @classmethod
    def of(
        cls,
        usage: Usage,
        setup: Setup,
        *,
        prompt_tokens: int,
        cached_tokens: int,
        new_tokens: int,
        finish_reason: FinishReason,
        peak_rss: int,
    ) -> Receipt:
        """Close the account of a request."""
        prefill = decode = ttft = None
        if usage.first is not None and usage.last is not None and usage.started is not None:
            ttft = usage.first - usage.added
            prefill = _rate(prompt_tokens - cached_tokens, usage.first - usage.started)
            decode = _rate(new_tokens - 1, usage.last - usage.first)
        io = usage.io
        return cls(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            new_tokens=new_tokens,
            finish_reason=finish_reason,
            ttft_s=ttft,
            prefill_tok_s=prefill,
            decode_tok_s=decode,
            bytes_read=round(io.bytes_read),
            page_cache_bytes=round(io.page_cache_bytes),
            hits=round(io.hits),
            misses=round(io.misses),
            io_overlap=max(0.0, 1.0 - io.stall_seconds / io.busy_seconds) if io.busy_seconds > 0 else None,
            stall_s=io.stall_seconds,
            hits_ahead=round(io.hits_ahead),
            bytes_ahead=round(io.bytes_ahead),
            bytes_wasted=round(io.bytes_wasted),
            peak_rss=peak_rss,
            setup=setup,
        )

    def lines(self) -> list[str]:
        """The account for people, one fact a line; lossy settings come first."""
        s = self.setup
        ttft = "no token" if self.ttft_s is None else f"first token after {self.ttft_s:.2f} s"
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        rows = [f"LOSSY     {setting}" for setting in s.lossy]
        rows += [
            f"prompt    {self.prompt_tokens} tokens{cached}{_speed(self.prefill_tok_s)}, {ttft}",
            f"reply     {self.new_tokens} tokens{_speed(self.decode_tok_s)}, ended by {self.finish_reason}",
            f"experts   {s.experts_used} of {s.experts_native} native per token; "
            f"{self.hits} hits, {self.misses} misses{_percent(' (', self.hit_rate, ' hit rate)')}",
            f"read      {format_size(self.bytes_read)} ({format_size(self.page_cache_bytes)} from the page cache), "
            f"waited {self.stall_s:.2f} s{_percent(', ', self.io_overlap, ' of I/O hidden')}",
            f"ahead     {_ahead(self)}",
            f"memory    peak {format_size(self.peak_rss)} of {format_size(s.budget)}; cache {s.cache}"
            + (f", {s.slots} slots of {format_size(s.slot_bytes)}" if s.slots else "")
            + (f" (plan measured on {s.measured})" if s.measured else ""),
            f"backend   {s.backend}, {s.threads} threads, {'exact' if s.exact else 'fast'} activations, "
            f"prompts in sweeps of {s.prefill_chunk}",
        ]
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Every field flat, for JSON."""
        values = asdict(self)
        setup = values.pop("setup")
        return {**values, "hit_rate": self.hit_rate, **setup, "lossy": list(self.setup.lossy)}


def _ahead(receipt: Receipt) -> str:
    if receipt.setup.prefetch == "off":
        return "nothing read before the router chose it (prefetch off)"
    return (
        f"{receipt.hits_ahead} experts in time, {format_size(receipt.bytes_ahead)} read before the router chose it, "
        f"{format_size(receipt.bytes_wasted)} for nothing"
    )


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def _speed(rate: float | None) -> str:
    return "" if rate is None else f" at {rate:.1f} tok/s"


def _percent(before: str, share: float | None, after: str) -> str:
    return "" if share is None else f"{before}{100 * share:.1f} %{after}"
