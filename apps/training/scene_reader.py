"""A light head that asks the states of a caption for the scene, thrown away after training."""

import torch
from torch import Tensor, nn

from apps.training.scene_facts import QUESTIONS, SPOTS


class SceneReader(nn.Module):
    """Asks the states of a caption for the scene: one query for each spot and each question.

    Args:
        dim: width of the states D.
        num_names: stickers that can be named.
        num_heads: attention heads.
    """

    def __init__(self, dim: int, num_names: int, num_heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(0.3 * torch.randn(len(SPOTS) + len(QUESTIONS), dim))
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.names = nn.Linear(dim, 1 + num_names)  # entry 0: nothing stands there
        self.answers = nn.ModuleDict({name: nn.Linear(dim, size) for name, size in QUESTIONS.items()})

    def forward(self, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Reads.

        Args:
            states: of the text encoder, (B, L, D).
            mask: bool, (B, L), True for real tokens.

        Returns:
            Logits: "names" (B, 6, 1 + names), "background" (B, 10), "count" (B, 5), "size" (B, 3).
        """
        queries = self.queries.expand(len(states), -1, -1)  # (B, Q, D)
        found = self.norm(self.attention(queries, states, states, key_padding_mask=~mask)[0])  # (B, Q, D)
        logits = {"names": self.names(found[:, : len(SPOTS)])}  # (B, 6, 1 + names)
        for number, (name, head) in enumerate(self.answers.items(), len(SPOTS)):
            logits[name] = head(found[:, number])  # (B, answers)
        return logits
