"""How a model is run. Built once, checked at once, never changed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from moestream.errors import ConfigError

MAX_THREADS = 1024
CacheMode = Literal["arena", "hybrid", "page", "none"]


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Settings of a loaded model.

    Raises:
        ConfigError: a value is out of range; the message names the field.
    """

    ram: int | None = None
    """Memory budget of the whole process in bytes; None: from free memory and the cgroup limit."""
    threads: int | None = None
    """Compute threads; None: from CPU affinity and the cgroup quota."""
    cache: CacheMode | None = None
    """``arena``: direct reads into slots kept by LFRU. ``page``: buffered, trust the OS. ``hybrid``: slots over
    buffered reads, so that the OS keeps what the slots drop. ``none``: keep nothing. None: see ``stored_plan``."""
    stored_plan: bool = True
    """Where neither ``ram`` nor ``cache`` is given, follow what ``moestream plan --measure`` found; else ``arena``."""
    exact: bool = False
    """Float32 activations and KV cache instead of int8 and float16."""
    active_experts: int | None = None
    """Use fewer experts than the model was trained with (lossy)."""
    prefill_chunk: int | None = None
    """Tokens of a prompt processed in one sweep over the layers, at most; None: by ``plan.prefill_chunk``, up to 4,096
    where experts are streamed, because a sweep reads each expert at most once."""
    max_decode_stall: int | None = None
    """Milliseconds that a prompt may keep replies waiting before its sweep rests; None: until its chunk is read."""
    max_batch: int | None = None
    """Sequences decoded together at most; None: up to 8. Their states share a budget, see ``MemoryPlan.states``."""
    context: int | None = None
    """Tokens of state the budget must hold per sequence; None: min(model's limit, 8192)."""
    io_threads: int = 8
    """Reads in flight."""
    prefix_cache: int | None = 0
    """Bytes for states of what prompts begin with, part of ``ram``; 0: none, None: a sixteenth of the budget."""
    prefix_disk: int = 0
    """Bytes of files that keep such states between runs. They hold prompts and replies, so 0 unless asked for."""
    prefetch: Literal["auto", "off"] = "auto"
    """``auto``: experts are read before their router has chosen them, as long as that is measured to pay."""
    backend: Literal["auto", "cpu", "reference"] = "auto"

    def __post_init__(self) -> None:
        """Reject what could only fail later."""
        numbers = ("ram", "threads", "active_experts", "prefill_chunk", "max_batch", "context", "io_threads")
        for name in (*numbers, "max_decode_stall"):
            value = getattr(self, name)
            if value is None and name != "io_threads":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        for name in ("prefix_cache", "prefix_disk"):
            value = getattr(self, name)
            if not isinstance(value, int | None) or isinstance(value, bool) or (value or 0) < 0:
                raise ConfigError(f"{name} must be bytes and not negative, got {value!r}")
        if self.prefix_disk and self.prefix_cache == 0:
            raise ConfigError("prefix_disk keeps what prefix_cache holds: give prefix_cache some memory too")
        for name in ("threads", "io_threads"):
            if (getattr(self, name) or 0) > MAX_THREADS:
                raise ConfigError(f"{name} must be at most {MAX_THREADS}, got {getattr(self, name)}")
        for name in ("exact", "stored_plan"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.cache not in (None, "arena", "hybrid", "page", "none"):
            raise ConfigError(f"cache must be arena, hybrid, page or none, got {self.cache!r}")
        if self.prefetch not in ("auto", "off"):
            raise ConfigError(f"prefetch must be auto or off, got {self.prefetch!r}")
        if self.backend not in ("auto", "cpu", "reference"):
            raise ConfigError(f"backend must be auto, cpu or reference, got {self.backend!r}")


UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
UNITS |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)} | {p: 1000**n for n, p in enumerate("KMGT", 1)}


def parse_size(value: str | int, name: str) -> int:
    """``8GB``, ``7.5 GiB``, ``800M`` or plain bytes; GB is 10^9 and GiB 2^30.

    Raises:
        ConfigError: it is none of these; the message starts with ``name``, the flag or argument.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", str(value))
    unit = UNITS.get(match[2].upper()) if match else None
    nbytes = int(float(match[1]) * unit) if match and unit else 0
    if isinstance(value, bool) or nbytes < 1:
        raise ConfigError(f"{name}: {value!r} is not a size; write for example 8GB, 7.5GiB or 800MB")
    return nbytes


def format_size(nbytes: float) -> str:
    """Bytes for people: ``217.4 GB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"
