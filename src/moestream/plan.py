"""The memory plan: what stays resident, what a batch needs, and how many expert slots the rest of the budget holds.

The budget covers the whole process, so what Python already uses counts too. Everything is computed from headers before
anything large is allocated. Shape letters: as in ``ops/base.py``; additionally V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moestream.checkpoint.encoding import MatrixSpec
from moestream.config import RunConfig, format_size
from moestream.errors import BudgetError, ConfigError
from moestream.experts.arena import area_nbytes
from moestream.experts.layer_plan import slot_nbytes
from moestream.experts.policy import SWEEP_ROWS
from moestream.models.config import ModelConfig
from moestream.models.states import nbytes_fixed, nbytes_per_token
from moestream.models.weights import WeightMap
from moestream.ops.base import Ops
from moestream.system import default_budget, rss

DEFAULT_CONTEXT = 8192
DEFAULT_BATCH = 8
SHORT = 1024  # tokens of a short sequence: as many may run as their states fit where those of the full ones would
STATES_SHARE = 8  # states of more than one sequence leave the experts seven eighths of what they could have without
FLOAT32 = 4
LIVE_RESIDUALS = 6  # arrays [T, H] alive at once: residual, normed, mixer or shared output, their sums, kernel copies
PREFIX_SHARE = 16  # part of the budget for prefixes where their memory is not given
CHUNK = 512
"""Tokens of a sweep where every expert stays in memory: larger ones gain little and keep other sequences waiting."""
STREAMED_CHUNKS = (4096, 2048, 1024)
"""Tried in turn where experts are streamed: twice the tokens for the same reads. Longer ones keep newcomers waiting."""
SMALL_CHUNKS = (256, 128)
"""Tried where the working memory of others does not fit."""
SCRATCH_SHARE = 4  # a sweep leaves the experts three quarters of what they have without
RUNTIME_NBYTES = 48 << 20  # interpreter growth, thread stacks and kernel scratch after the plan is made


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose; ``total`` is what the process will use at most."""

    budget: int
    baseline: int
    """Resident memory of the process before loading, plus what the runtime will add."""
    dense: int
    """Weights that stay resident, as the backend holds them."""
    embed_on_disk: bool
    """The embedding table is not among them: rows are read when they are needed, as a token uses one of them."""
    states: int
    """KV caches and delta-net states: of at least one sequence of ``context`` tokens, shared by all that run."""
    scratch: int
    """Activations, expert outputs and logits of the largest step, without what is borrowed."""
    borrowed: int
    """What a sweep of ``prefill_chunk`` tokens needs besides, of the slots' memory while it runs."""
    prefixes: int
    """States of what prompts begin with."""
    slot_nbytes: int
    """One expert, with the room that unaligned direct reads need."""
    slots: int
    slots_minimum: int
    """Fewer cannot hold the experts of one token."""
    experts: int
    """Routed experts of all layers."""
    context: int
    max_batch: int
    """As asked for, or chosen."""
    token_nbytes: int
    """Expert bytes that a token touches, over all layers."""
    prefill_chunk: int
    """Prompt tokens of a sweep: as asked for, or chosen."""

    @property
    def arena(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.slot_nbytes

    def borrowed_slots(self, rows: int) -> int:
        """Slots that lend their memory to passes of so many rows together."""
        first = SWEEP_ROWS + self.max_batch
        share = (rows - first) / max(1, self.prefill_chunk + self.max_batch - first)
        return -int(-self.borrowed * min(1.0, max(0.0, share)) // self.slot_nbytes)

    @property
    def streamed(self) -> int:
        """Bytes of the experts that have no slot of their own while a sweep runs: about what it reads."""
        return (self.experts - self.slots) * self.slot_nbytes + self.borrowed

    @property
    def fixed(self) -> int:
        """Bytes of everything but the slots."""
        return self.baseline + self.dense + self.states + self.scratch + self.prefixes

    @property
    def total(self) -> int:
        """Bytes of the whole process."""
        return self.fixed + self.arena


def plan_memory(
    weights: WeightMap,
    config: ModelConfig,
    run: RunConfig,
    ops: Ops,
    budget: int | None = None,
    most_slots: int | None = None,
) -> MemoryPlan:
    """Divide a memory budget.

    Args:
        weights: from ``map_weights``.
        config: the model.
        run: chunk, batch, context and cache mode; ``run.ram`` is the budget unless one is given.
        ops: the backend; the reference decodes matrices to float32, exact backends keep a float32 KV cache.
        budget: bytes of the whole process; None: ``run.ram``, or most of what is available.
        most_slots: use no more slots than this, where more were measured to be slower.

    Raises:
        BudgetError: the budget does not hold what must be resident; says what is needed and which flags lower it.
        ConfigError: the context is longer than the model's.
    """
    budget = budget or run.ram or default_budget()
    context = _context(config, run)
    active = run.active_experts or config.moe.active
    tables, slot = weights.experts, slot_nbytes(list(weights.experts.values()))
    matrices = {spec.name: _matrix_nbytes(spec, ops) for spec in weights.matrices()}
    dense = sum(matrices.values()) + _vectors_nbytes(weights)
    resident = {"baseline": rss() + RUNTIME_NBYTES, "dense": dense}
    sequence = context * nbytes_per_token(config, ops.exact) + nbytes_fixed(config)
    prefixes = budget // PREFIX_SHARE if run.prefix_cache is None else run.prefix_cache
    experts = len(tables) * config.moe.experts
    minimum = active if tables else 0

    def scratch_of(chunk: int) -> int:
        return _scratch_nbytes(config, chunk, batch, active)

    def fixed_with(states: int, scratch: int) -> dict[str, int]:
        return {**resident, "states": states, "scratch": scratch, "prefixes": prefixes}

    def left_with(chunk: int) -> int:
        return budget - sum(fixed_with(states, scratch_of(chunk)).values())

    def streams() -> bool:
        return wanted < experts or left_with(CHUNK) // slot < experts

    full = batch = run.max_batch or DEFAULT_BATCH
    while full > 1 and not _leaves_room(budget, fixed_with(full * sequence, scratch_of(run.prefill_chunk or CHUNK))):
        full -= 1
    short = min(context, SHORT) * nbytes_per_token(config, ops.exact) + nbytes_fixed(config)
    states = max(full * sequence, (run.max_batch or 1) * short)
    batch = min(batch, states // short)
    wanted = experts if most_slots is None else max(minimum, min(experts, most_slots))
    if run.cache in ("page", "none") and tables:  # slots only receive the reads of one layer
        wanted = min(config.moe.experts, max(active * batch, run.io_threads))
    embed_on_disk = streams() and weights.head is not None
    if embed_on_disk:
        resident["dense"] -= matrices[weights.embed.name]
    chunk = run.prefill_chunk or _choose_chunk(left_with, minimum * slot, streams())
    scratch, left = scratch_of(chunk), left_with(chunk)
    if left < minimum * slot:
        raise _too_small(budget, fixed_with(states, scratch), minimum * slot, context)
    borrowed = 0
    if streams() and run.cache not in ("page", "none"):
        least = scratch_of(min(chunk, SWEEP_ROWS))
        borrowed = max(0, min(scratch - least, left // (SCRATCH_SHARE - 1), wanted * slot - left))
    return MemoryPlan(
        budget=budget,
        **fixed_with(states, scratch - borrowed),
        embed_on_disk=embed_on_disk,
        borrowed=borrowed,
        slot_nbytes=slot,
        slots=min(wanted, (left + borrowed) // slot) if tables else 0,
        slots_minimum=minimum,
        experts=experts,
        context=context,
        max_batch=batch,
        token_nbytes=active * sum(t.layout.nbytes for t in tables.values()),
        prefill_chunk=chunk,
    )


def _context(config: ModelConfig, run: RunConfig) -> int:
    """Tokens of the longest sequence."""
    context = run.context or min(config.max_positions, DEFAULT_CONTEXT)
    if context > config.max_positions:
        raise ConfigError(f"context is {context}, the model was trained for {config.max_positions} positions")
    return context


def _choose_chunk(left_with: Callable[[int], int], least: int, streamed: bool) -> int:
    """The tokens of a sweep for what a chunk leaves to the experts, who need ``least`` bytes.

    A sweep of so many tokens asks for most experts of every layer, so where they are streamed it reads about as much
    whatever its length: the longest whose working memory is small beside the slots that it displaces or borrows.
    """
    most = left_with(CHUNK)
    if streamed:
        for chunk in STREAMED_CHUNKS:
            if SCRATCH_SHARE * (most - left_with(chunk)) <= most:
                return chunk
    return next((chunk for chunk in (CHUNK, *SMALL_CHUNKS) if left_with(chunk) >= least), SMALL_CHUNKS[-1])


def _matrix_nbytes(spec: MatrixSpec, ops: Ops) -> int:
    """A resident matrix: raw parts as ``load_extents`` places them, decoded besides by the reference."""
    decoded = spec.layout.rows * spec.layout.cols * FLOAT32 if ops.name == "reference" else 0
    return decoded + sum(area_nbytes(part.nbytes) for part in spec.parts)


def _vectors_nbytes(weights: WeightMap) -> int:
    total = 0
    for layer in weights.layers:
        vectors = [layer.mixer_norm, layer.mlp_norm, *layer.mixer.vectors.values(), *layer.mlp.vectors.values()]
        total += sum(entry.nbytes for entry in vectors) * 2  # bf16 becomes float32
    return total


def _leaves_room(budget: int, fixed: dict[str, int]) -> bool:
    """Whether the states of a batch are small beside what they take from."""
    return STATES_SHARE * fixed["states"] <= budget - sum(fixed.values()) + fixed["states"]


def _scratch_nbytes(config: ModelConfig, chunk: int, batch: int, active: int) -> int:
    """Activations of the largest step: one prompt chunk beside a full batch of decoding rows."""
    a, d, m = config.attention, config.delta_net, config.moe
    attention = (2 + a.gated) * a.heads * a.head_dim + 2 * a.kv_heads * a.head_dim
    delta_net = 0 if d is None else 2 * d.channels + 3 * d.values
    mlp = 3 * max(m.shared_intermediate, config.dense_intermediate) + active * (config.hidden_size + 2 * m.intermediate)
    row = LIVE_RESIDUALS * config.hidden_size + max(attention, delta_net, mlp + m.experts)
    return FLOAT32 * ((chunk + batch) * row + 2 * batch * config.vocab_size)


def _too_small(budget: int, fixed: dict[str, int], slots: int, context: int) -> BudgetError:
    """Say what is needed, and for each part that can shrink, by which setting."""
    need = sum(fixed.values()) + slots
    return BudgetError(
        f"the memory budget is {format_size(budget)}, but at least {format_size(need)} are needed:\n"
        f"  {format_size(fixed['baseline'])} process\n"
        f"  {format_size(fixed['dense'])} resident weights\n"
        f"  {format_size(fixed['states'])} states of {context} tokens (lower --context or --max-batch)\n"
        f"  {format_size(fixed['scratch'])} working memory (lower --prefill-chunk)\n"
        + (f"  {format_size(fixed['prefixes'])} prefixes (lower --prefix-cache)\n" if fixed["prefixes"] else "")
        + f"  {format_size(slots)} expert slots for one token\n"
        "Raise --ram, or lower what is named above"
    )
