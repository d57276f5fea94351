"""From a model folder to a running engine: headers, plan, reader, resident weights, slots.

Nothing large is allocated before the plan fits the budget.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs

from moestream.checkpoint.encoding import Extent
from moestream.checkpoint.index import Checkpoint, open_checkpoint
from moestream.config import CacheMode, RunConfig
from moestream.engine.engine import Engine
from moestream.engine.memory_watch import MemoryWatch
from moestream.engine.pace import Pace
from moestream.engine.prefix import PrefixCache
from moestream.engine.prefix_files import FORMAT, PrefixFiles
from moestream.engine.receipt import IoCounters, Receipt, Setup
from moestream.engine.sequence import Sequence
from moestream.engine.state_budget import StateBudget
from moestream.errors import BackendError
from moestream.experts.arena import load_extents
from moestream.experts.native_reader import make_reader
from moestream.experts.reader import Reader
from moestream.experts.store import ExpertStore
from moestream.models.config import ModelConfig
from moestream.models.loader import load_model
from moestream.models.model import Model
from moestream.models.registry import parse_config
from moestream.models.states import nbytes_fixed, nbytes_per_token
from moestream.models.weights import WeightMap, map_weights
from moestream.ops.base import U8, Ops
from moestream.ops.reference import ReferenceOps
from moestream.plan import MemoryPlan, plan_memory
from moestream.stored_plan import follow, model_fingerprint
from moestream.system import cpu_count, kept_free, memory, peak_rss

PREFIX_VARIABLE = "MOESTREAM_PREFIXES"
"""Environment variable: another folder for the files of the prefix cache."""
Progress = Callable[[str, int, int], None]
"""Called with (what, bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """A loaded model and everything it runs on."""

    folder: Path
    config: ModelConfig
    plan: MemoryPlan
    model: Model
    store: ExpertStore
    reader: Reader
    engine: Engine
    setup: Setup
    watch: MemoryWatch | None
    """What lets the cache give way where nobody named a budget."""

    @property
    def slots(self) -> int:
        """Experts that fit in memory together now."""
        return min(self.plan.slots, self.store.slots)

    def receipt(self, sequence: Sequence) -> Receipt:
        """The account of a finished sequence."""
        assert sequence.finish_reason is not None
        return Receipt.of(
            sequence.usage,
            replace(self.setup, slots=self.slots),
            prompt_tokens=len(sequence.prompt),
            new_tokens=len(sequence.tokens),
            cached_tokens=sequence.cached,
            finish_reason=sequence.finish_reason,
            peak_rss=peak_rss(),
        )

    def close(self) -> None:
        """Give back slots, files and threads; what the prefix cache may keep goes to its folder."""
        if self.watch is not None:
            self.watch.close()
        self.engine.close()
        self.store.reset()  # an interrupted step may have left reads under way
        self.store.close()
        self.reader.close()


def load_runtime(
    folder: Path,
    run: RunConfig,
    eos_ids: abc.Set[int] = frozenset(),
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Runtime:
    """Load a model folder.

    Args:
        folder: Hugging Face style folder.
        run: How to run it.
        eos_ids: End tokens besides those of ``config.json``.
        progress: Told how many bytes of resident weights have been read.
        checkpoint: Of that folder, as far as it is open already.

    Raises:
        CheckpointError: the folder cannot be used.
        BudgetError: the budget cannot hold what must be resident.
        ConfigError: a setting does not fit the model.
        BackendError: the backend asked for is not installed.
        ReadError: the disk failed.
    """
    run, stored = follow(run, folder)
    assert run.cache is not None  # settled by follow
    checkpoint = checkpoint or open_checkpoint(folder)
    config, names = parse_config(checkpoint.config)
    weights = map_weights(checkpoint, config, names)
    threads = run.threads or cpu_count()
    ops = choose_ops(run, threads)
    most_slots = None if stored is None else stored.slots
    kept = None if run.ram else kept_free(memory().available)
    plan = plan_memory(weights, config, run, ops, most_slots=most_slots)
    reader = make_reader(run.io_threads)
    try:
        store = make_store(checkpoint, weights, config, plan.slots, run.cache, reader)
        read = _resident_reader(checkpoint, reader, progress)
        model = load_model(checkpoint, config, weights, ops, store, read, run.active_experts, plan.embed_on_disk)
        model.read_ahead = None if run.prefetch == "off" else store
        model.lend_for = lambda rows: store.lend(plan.borrowed_slots(rows))
    except BaseException:
        reader.close()
        raise
    engine = Engine(
        model,
        vocab_size=config.vocab_size,
        context=plan.context,
        eos_ids=eos_ids | set(config.eos_ids),
        max_batch=plan.max_batch,
        prefill_chunk=plan.prefill_chunk,
        prefixes=_prefix_cache(folder, run, plan, model, eos_ids | set(config.eos_ids)),
        states=StateBudget(plan.states, nbytes_per_token(config, ops.exact), nbytes_fixed(config)),
        pace=Pace(None if run.max_decode_stall is None else run.max_decode_stall / 1000),
        counters=lambda: _counters(store),
        recover=store.reset,
    )
    setup = Setup(
        backend=ops.name,
        cache=run.cache,
        exact=ops.exact,
        experts_native=config.moe.active,
        experts_used=model.active_experts,
        prefill_chunk=plan.prefill_chunk,
        slots=plan.slots,
        slot_bytes=plan.slot_nbytes,
        budget=plan.budget,
        threads=threads,
        prefetch=run.prefetch,
        measured=None if stored is None else stored.day,
    )
    watch = None
    if kept is not None and MemoryWatch.helps(store):
        watch = MemoryWatch(store, engine.running, kept)
        watch.start()
    return Runtime(folder, config, plan, model, store, reader, engine, setup, watch)


def make_store(
    checkpoint: Checkpoint, weights: WeightMap, config: ModelConfig, slots: int, cache: CacheMode, reader: Reader
) -> ExpertStore:
    """The store of a model's routed experts.

    Raises:
        ReadError: a file cannot be opened.
    """
    tables = [weights.experts.get(layer) for layer in range(len(config.layers))]
    return ExpertStore(tables, checkpoint.files, max(1, slots), cache, reader)


def _prefix_cache(
    folder: Path, run: RunConfig, plan: MemoryPlan, model: Model, message_ends: abc.Set[int]
) -> PrefixCache | None:
    """What keeps the states of prefixes, and where; None if the plan has no memory for it."""
    if not plan.prefixes:
        return None
    files = None
    if run.prefix_disk:
        what = f"{FORMAT} {model_fingerprint(folder)} {model.ops.name} {model.ops.exact} {model.active_experts}"
        key = hashlib.sha256(what.encode()).hexdigest()[:24]
        root = os.environ.get(PREFIX_VARIABLE)
        prefixes = Path(root) if root else platformdirs.user_cache_path("moestream") / "prefixes"
        files = PrefixFiles(prefixes / key, run.prefix_disk, model.new_states())
    return PrefixCache(plan.prefixes, model.config.delta_net is not None, message_ends, files)


def choose_ops(run: RunConfig, threads: int) -> Ops:
    """The backend to compute with; without a native one ``auto`` warns and takes the reference.

    Raises:
        BackendError: ``cpu`` was asked for and is not installed.
    """
    if run.backend == "reference":
        return ReferenceOps()
    try:
        from moestream.ops.cpu import CpuOps  # noqa: PLC0415 - raises where there is no native module
    except BackendError as error:
        if run.backend == "cpu":
            raise
        warnings.warn(f"slow fallback: numpy computes, because {error}", stacklevel=2)
        return ReferenceOps()
    return CpuOps(threads, run.exact)


def _resident_reader(
    checkpoint: Checkpoint, reader: Reader, progress: Progress | None
) -> Callable[[abc.Sequence[Extent]], list[U8]]:
    """Reads byte ranges of the checkpoint into one allocation, and reports progress."""

    def read(extents: abc.Sequence[Extent]) -> list[U8]:
        total, done = sum(extent.nbytes for extent in extents), 0

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress("resident weights", done, total)

        return load_extents(reader, checkpoint.files, extents, progress=advance)

    return read


def _counters(store: ExpertStore) -> IoCounters:
    stats = store.stats()
    return IoCounters(
        bytes_read=stats.bytes_read + stats.bytes_cached,
        page_cache_bytes=stats.bytes_cached,
        hits=stats.hits,
        misses=stats.misses,
        busy_seconds=stats.busy_seconds,
        stall_seconds=stats.stall_seconds,
        hits_ahead=stats.hits_ahead,
        bytes_ahead=stats.bytes_ahead,
        bytes_wasted=stats.bytes_wasted,
    )
