"""What embeds a sequence that is told beside a label, either of which may be missing: pictures, the features of a text model.

Source: Saharia et al. (Imagen), 2022, arXiv:2205.11487, section 2.3 (the mean of the sequence, and attention to its elements).

Shape letters: B batch, S elements of the sequence, E their width, N width of the prior's condition.
"""

import torch
from torch import Tensor, nn

from tessera.contracts import TokenSpec
from tessera.nn.cross_attention import Context
from tessera.nn.transformer import RMSNorm


class BesideLabel(nn.Module):
    """(B, 1 + size) a label plus 1, or 0 for none, and what is told beside it; or (B,) labels up to and including the null
    label -> (B, N). It stands where a table of labels would. A condition defines `elements` and `silent`.
    """

    context: Context | None

    def __init__(self, spec: TokenSpec, replaced: nn.Embedding, context: Context | None, width: int):
        """replaced: the table of labels, which is kept for these, and whose scale the sequence has; width: E."""
        super().__init__()
        self.num_classes, self.context, self.labels = spec.num_classes, context, replaced
        self.norm = RMSNorm(width)
        self.leave = nn.Linear(width, replaced.embedding_dim)
        self.nothing = nn.Parameter(torch.zeros(replaced.embedding_dim))  # what no sequence is
        nn.init.normal_(self.leave.weight, std=float(replaced.weight.detach().std()) / width**0.5)
        nn.init.zeros_(self.leave.bias)

    def elements(self, beside: Tensor) -> tuple[Tensor, Tensor]:
        """(B, size) what is told beside the labels -> (B, S, E), and (B, S) which of the elements there are."""
        raise NotImplementedError("each condition reads its own")

    def silent(self, number: int) -> Tensor:
        """(number, size) what says nothing beside a label."""
        raise NotImplementedError("each condition has its own")

    def of_labels(self, labels: Tensor) -> Tensor:
        """(B,) labels -> (B, 1 + size): each alone."""
        number = (labels + 1) % (self.num_classes + 1)
        return torch.cat([number.unsqueeze(1).float(), self.silent(len(labels)).to(labels.device)], dim=1)

    def forward(self, told: Tensor) -> Tensor:
        told = self.of_labels(told) if told.ndim == 1 else told
        sequence, is_there = self.elements(told[:, 1:])
        if self.context is not None:
            self.context.tell(sequence, is_there)
        mean = (sequence * is_there.unsqueeze(2)).sum(dim=1) / is_there.sum(dim=1, keepdim=True).clamp_min(1)
        said = torch.where(is_there.any(dim=1, keepdim=True), self.leave(self.norm(mean)), self.nothing)
        return said + self.labels((told[:, 0].long() - 1) % (self.num_classes + 1))
