"""What the window rows predict: a part of a case, scaled, with its labels: prepare_kitseg.py WORK."""

from __future__ import annotations

import sys
from pathlib import Path

import network
import torch

from kitseg.links.crop import crop
from kitseg.links.intensity import AIR
from kitseg.types import Box
from kitseg.volumes.store import open_case

work = Path(sys.argv[1])
folders = sorted((work / "preprocessed" / "3mm-0.7816mm").iterdir())
case = max((open_case(folder) for folder in folders), key=lambda case: len(case.foreground))
middle = case.foreground[:, 1:].mean(0).astype(int)
start = [int(m) - n // 2 for m, n in zip(middle, network.REGION, strict=True)]
box = Box((start[0], start[1], start[2]), tuple(a + n for a, n in zip(start, network.REGION, strict=True)))
image, label = crop(case.image, box, AIR), crop(case.label, box, 0)
scaled = torch.from_numpy(image).float().clamp(-250, 250) / 250
torch.save({"image": scaled[None], "label": torch.from_numpy(label)}, work / "region.pt")
