"""The meaning of a stage's output channels.

With a channel ``background`` they are mutually exclusive (softmax), without one they are independent (sigmoid).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kitseg.labels import BACKGROUND, CLASSES, CYST, KIDNEY, TUMOR

#: ``foreground`` is kidney with its lesions; without a tumor channel it gets the kidney's id.
IDS = {"background": BACKGROUND, "foreground": KIDNEY, **CLASSES}


def target_ids(label: Tensor, channels: Sequence[str]) -> Tensor:
    """The index of each voxel's true channel; for a single channel, 1 where it is true and 0 elsewhere.

    Cysts are kidney where the channels have no cyst.

    Args:
        label: label ids of any shape.
        channels: of the network's output.
    """
    if "kidney" in channels:
        return label.long() if "cyst" in channels else torch.where(label == CYST, KIDNEY, label.long())
    return (label == TUMOR).long() if "tumor" in channels else (label > BACKGROUND).long()


def label_ids(values: Tensor, channels: Sequence[str], threshold: float | None = None) -> NDArray[np.uint8]:
    """Label ids (D, H, W) from probabilities (K, D, H, W).

    Args:
        values: the probabilities.
        channels: their names.
        threshold: foreground threshold; None for the most probable channel, or above 0.5 for a single channel.
    """
    ids = torch.tensor([IDS[channel] for channel in channels], dtype=torch.uint8)
    if threshold is not None:
        found = (foreground(values, channels) >= threshold).to(torch.uint8) * ids[-1]
    elif "background" in channels:
        found = ids[values.max(dim=0).indices]  # argmax takes 15 times as long on a CPU
    else:
        found = ((values > 0.5).to(torch.uint8) * ids[:, None, None, None]).amax(dim=0)
    result: NDArray[np.uint8] = found.numpy()
    return result


def foreground(values: Tensor, channels: Sequence[str]) -> Tensor:
    """The probability of foreground (not background), (D, H, W)."""
    if "background" in channels:
        return 1 - values[channels.index("background")]
    return values.amax(dim=0)


def spread(values: Tensor, seen: NDArray[np.bool_], channels: Sequence[str]) -> Tensor:
    """Extend probabilities of the processed slices, (K, d, H, W), to all slices (D,) with background."""
    if seen.all():
        return values
    out = values.new_zeros(len(values), len(seen), *values.shape[2:])
    if "background" in channels:
        out[channels.index("background")] = 1
    out[:, torch.from_numpy(seen)] = values
    return out
