"""What one decoded token asks of a machine, from the index of a checkpoint alone."""

from __future__ import annotations

from dataclasses import dataclass

from moestream.models.config import ModelConfig
from moestream.models.weights import WeightMap


@dataclass(frozen=True, slots=True)
class Demand:
    """Work of one decoded token. Attention over the context and the states come on top; they are small here."""

    dense_bytes: int
    """Resident matrices, all of which are multiplied with; of the embedding only one row is."""
    expert_bytes: int
    """k experts of each layer that has them."""
    flops: int
    """Two for each weight touched."""
    head_flops: int
    """The part of the output head, which a prompt needs only once."""

    @property
    def touched(self) -> int:
        """Bytes that pass from memory to the cores."""
        return self.dense_bytes + self.expert_bytes


def token_demand(config: ModelConfig, weights: WeightMap, active: int) -> Demand:
    """The demand of a token that uses ``active`` experts a layer."""
    layouts = [spec.layout for spec in weights.matrices()]
    if weights.head is not None:
        layouts.remove(weights.embed.layout)
    head = weights.embed.layout if weights.head is None else weights.head.layout
    experts = [matrix for table in weights.experts.values() for matrix in table.layout.matrices]
    return Demand(
        dense_bytes=sum(layout.nbytes for layout in layouts),
        expert_bytes=active * sum(layout.nbytes for layout in experts),
        flops=2 * (sum(m.rows * m.cols for m in layouts) + active * sum(m.rows * m.cols for m in experts)),
        head_flops=2 * head.rows * head.cols,
    )
