"""One-hot encoding of class ids."""

from __future__ import annotations

import torch
from torch import Tensor


def one_hot(target: Tensor, like: Tensor) -> Tensor:
    """One-hot encode class ids (N, *spatial) int64 in the shape (N, K, *spatial), type and device of ``like``.

    Raises:
        ValueError: the shapes don't match.
    """
    if target.shape != like.shape[:1] + like.shape[2:]:
        raise ValueError(f"class ids of shape {tuple(target.shape)} don't match logits of shape {tuple(like.shape)}")
    return torch.zeros_like(like).scatter_(1, target.unsqueeze(1), 1.0)
