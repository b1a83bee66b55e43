"""Class ids as one channel per class."""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot(target: Tensor, like: Tensor) -> Tensor:
    """The class ids (N, *spatial) int64 as 0 and 1 in the shape (N, K, *spatial), type and device of ``like``.

    Raises:
        ValueError: the shapes don't belong together.
    """
    if target.shape != like.shape[:1] + like.shape[2:]:
        raise ValueError(f"class ids of shape {tuple(target.shape)} don't fit logits of shape {tuple(like.shape)}")
    return torch.zeros_like(like).scatter_(1, target.unsqueeze(1), 1.0)
