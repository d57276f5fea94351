"""What a model is: one frozen description shared by every architecture, and the reader of ``config.json`` fields.

Shape letters: as in ``ops/base.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moestream.errors import ModelConfigError

Mixer = Literal["attention", "delta_net"]
Mlp = Literal["moe", "dense"]

MAX_LAYERS = 4096
MAX_INTEGER = 2**31 - 1
MAX_HEAD_DIM = 1024  # of the kernels of attention
MAX_CONV_WIDTH = 16  # of the kernel of delta-net


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one decoder layer is made of."""

    mixer: Mixer
    mlp: Mlp


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Grouped-query attention with per-head q/k norms and half-split rotary embedding."""

    heads: int  # Hq
    kv_heads: int  # Hkv
    head_dim: int  # D
    rotary_dim: int  # R
    rope_theta: float
    gated: bool  # q_proj also yields a sigmoid output gate


@dataclass(frozen=True, slots=True)
class DeltaNetShape:
    """Gated delta-net (arXiv 2412.06464) behind a causal depthwise convolution."""

    key_heads: int  # Hk
    value_heads: int  # Hv
    key_dim: int  # Dk
    value_dim: int  # Dv
    conv_width: int  # W

    @property
    def values(self) -> int:
        """Hv * Dv, the width of v, z and the output."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """C, the width of q, k and v together."""
        return 2 * self.key_heads * self.key_dim + self.values


@dataclass(frozen=True, slots=True)
class MoeShape:
    """A routed feed-forward layer."""

    experts: int  # E
    active: int  # k, as the model was trained
    intermediate: int  # I
    shared_intermediate: int  # width of the shared expert, 0: none
    renormalise: bool  # the k weights are divided by their sum


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only language model."""

    model_type: str
    hidden_size: int  # H
    layers: tuple[LayerPlan, ...]
    vocab_size: int  # V
    eps: float
    attention: AttentionShape
    delta_net: DeltaNetShape | None
    moe: MoeShape
    dense_intermediate: int
    """Width of the ``dense`` MLPs, 0 if there are none."""
    tied: bool
    """The output head is the embedding table."""
    zero_centred_norms: bool
    """Hugging Face files store w of norms that multiply by 1 + w."""
    eos_ids: tuple[int, ...]
    max_positions: int

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.mlp == "moe")


class Fields:
    """Typed access to a JSON object of ``config.json``; every failure names the field.

    Raises:
        ModelConfigError: from every method, when a field is missing or has the wrong type or value.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Read from ``values``, which lies at ``prefix`` (``"text_config."``) of the file."""
        self._values = values
        self._prefix = prefix

    def error(self, name: str, problem: str) -> ModelConfigError:
        """An error about one field."""
        return ModelConfigError(f"config.json: {self._prefix}{name} {problem}")

    def __contains__(self, name: str) -> bool:
        """Whether the field exists and is not null."""
        return self._values.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The raw value, or ``default`` when missing or null."""
        return self._values[name] if name in self else default

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least ``least`` that fits 32 bits."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"must be an integer, got {value!r}")
        if value < least:
            raise self.error(name, f"must be at least {least}, got {value}")
        if value > MAX_INTEGER:
            raise self.error(name, f"must be at most {MAX_INTEGER}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, f"must be a number, got {value!r}")
        if not 0 < value <= sys.float_info.max:  # JSON integers have no limit of their own
            raise self.error(name, f"must be finite and above 0, got {value}")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._required(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, got {value!r}")
        return value

    def integers(self, name: str, default: list[int] | None = None) -> list[int]:
        """A list of integers; a single integer counts as a list of one."""
        value = self._required(name, default)
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
            raise self.error(name, f"must be a list of integers, got {value!r}")
        return values

    def nested(self, name: str) -> Fields:
        """A nested object."""
        value = self._required(name, None)
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, got {value!r}")
        return Fields(value, f"{self._prefix}{name}.")

    def only(self, name: str, supported: object) -> None:
        """Refuse a field that is present with any other value than the one we run."""
        if name in self and self.get(name) != supported:
            raise self.error(name, f"is {self.get(name)!r}; only {supported!r} is supported")

    def _required(self, name: str, default: object) -> Any:
        value = self.get(name, default)
        if value is None:
            raise self.error(name, "is missing")
        return value


def rope(fields: Fields, factor: float = 1.0) -> tuple[float, float]:
    """Rotary base and the share of the head it turns (by default ``factor``): (rope_theta, partial_rotary_factor).

    Accepts the old form (top-level ``rope_theta``, ``partial_rotary_factor``, ``rope_scaling``) and transformers 5's
    ``rope_parameters``. Multimodal sections need no attention: on text all position grids are equal.

    Raises:
        ModelConfigError: a scaled rope (YaRN, linear, ...), or a field is missing or wrong.
    """
    for name in ("rope_parameters", "rope_scaling"):
        if name in fields:
            scaling = fields.nested(name)
            kind = scaling.get("rope_type", scaling.get("type", "default"))
            if kind not in ("default", "mrope"):
                raise scaling.error(
                    "rope_type", f"is {kind!r}; only 'default' is supported (remove it to run unscaled)"
                )
    source = fields.nested("rope_parameters") if "rope_parameters" in fields else fields
    theta = source.number("rope_theta") if "rope_theta" in source else fields.number("rope_theta")
    return theta, source.number("partial_rotary_factor", fields.number("partial_rotary_factor", factor))


def rotary_dim(fields: Fields, head_dim: int, factor: float) -> int:
    """R = head_dim * factor, which must be even and at most ``head_dim``."""
    dims = int(head_dim * factor)
    if dims < 2 or dims % 2 or dims > head_dim:
        raise fields.error(
            "partial_rotary_factor", f"of {factor} leaves {dims} of {head_dim} dims; need an even number"
        )
    return dims


def layer_count(fields: Fields) -> int:
    """L, bounded because config files come from strangers."""
    count = fields.integer("num_hidden_layers")
    if count > MAX_LAYERS:
        raise fields.error("num_hidden_layers", f"must be at most {MAX_LAYERS}, got {count}")
    return count


def heads(fields: Fields) -> tuple[int, int, int]:
    """Query heads, KV heads and head dim, where the KV heads divide the query heads."""
    query = fields.integer("num_attention_heads")
    kv = fields.integer("num_key_value_heads", query)
    if query % kv:
        raise fields.error("num_key_value_heads", f"({kv}) must divide num_attention_heads ({query})")
    head_dim = fields.integer("head_dim", fields.integer("hidden_size") // query)
    if head_dim > MAX_HEAD_DIM:
        raise fields.error("head_dim", f"must be at most {MAX_HEAD_DIM}, got {head_dim}")
    return query, kv, head_dim


def conv_width(fields: Fields) -> int:
    """W, bounded by the kernel."""
    width = fields.integer("linear_conv_kernel_dim", least=2)
    if width > MAX_CONV_WIDTH:
        raise fields.error("linear_conv_kernel_dim", f"must be at most {MAX_CONV_WIDTH}, got {width}")
    return width


def active_experts(fields: Fields, experts: int) -> int:
    """k, at most E."""
    k = fields.integer("num_experts_per_tok")
    if k > experts:
        raise fields.error("num_experts_per_tok", f"({k}) is more than num_experts ({experts})")
    return k
