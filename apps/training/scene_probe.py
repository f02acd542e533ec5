"""A small head that predicts the labels of a scene from the states of a caption; thrown away after training."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apps.training.scene_labels import ATTRIBUTES, SLOTS


class SceneProbe(nn.Module):
    """Attention pooling with one query for each slot and each attribute, then a linear layer.

    Args:
        dim: Width of the states D.
        num_names: Stickers that can be named.
        num_heads: Attention heads.
        num_slots: S, places where a sticker can be named.
        attributes: Name and number of classes of what else is predicted.
    """

    def __init__(
        self,
        dim: int,
        num_names: int,
        num_heads: int,
        num_slots: int = len(SLOTS),
        attributes: Mapping[str, int] = ATTRIBUTES,
    ) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.queries = nn.Parameter(0.3 * torch.randn(num_slots + len(attributes), dim))
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.names = nn.Linear(dim, 1 + num_names)  # class 0: the slot is empty
        self.answers = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in attributes.items()})

    def forward(self, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Predict the labels.

        Args:
            states: States of the text encoder, (B, L, D).
            mask: Bool, (B, L), True for real tokens.

        Returns:
            Logits: "names" (B, S, 1 + names), the attributes (B, classes).
        """
        queries = self.queries.expand(len(states), -1, -1)  # (B, Q, D)
        pooled = self.norm(self.attention(queries, states, states, key_padding_mask=~mask)[0])  # (B, Q, D)
        logits = {"names": self.names(pooled[:, : self.num_slots])}  # (B, S, 1 + names)
        for number, (name, head) in enumerate(self.answers.items(), self.num_slots):
            logits[name] = head(pooled[:, number])  # (B, classes)
        return logits
