"""A U-Net on slices: two-stage's second stage (paper, section 2.2) and both of dual-unet's (paper, section 2)."""

from __future__ import annotations

from kitseg.stages.base import SliceStage


class SliceUNet(SliceStage):
    """Segments slices; ``net`` is a ``kitseg.nets.unet.UNet`` with as many outputs as the stage has channels."""
