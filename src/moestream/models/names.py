"""What the tensors of a model are called. One value per architecture; the defaults are the names most share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Where an architecture keeps its tensors."""

    prefixes: tuple[str, ...]
    """Possible prefixes of everything but the head; the first under which the embedding exists is used."""
    heads: tuple[str, ...]
    """Possible paths of the output head."""
    ignored: tuple[str, ...]
    """Prefixes of tensors that text generation does not need."""
    embed: str = "embed_tokens"
    norm: str = "norm"
    mixer_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
