"""Training samples a second of nnU-Net's trainer with its own network and plan: train_nnunetv2.py WORK DEVICE."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from side import say

if __name__ == "__main__":  # its loaders start processes
    folder, device = Path(sys.argv[1]) / "nnunet" / "preprocessed" / "Dataset001_Kidneys", torch.device(sys.argv[2])
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    names = sorted(path.stem for path in (folder / "nnUNetPlans_3d_fullres").glob("*.pkl"))
    (folder / "splits_final.json").write_text(json.dumps([{"train": names, "val": names[:1]}]))
    plans["continue_training"] = False  # what its command adds
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, json.loads((folder / "dataset.json").read_text()), device)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    for count in (5, 30 if device.type == "cuda" else 2):
        begun = time.perf_counter()
        for _ in range(count):
            trainer.train_step(next(trainer.dataloader_train))
        seconds = (time.perf_counter() - begun) / count
    say(trainer.batch_size / seconds)
    trainer.dataloader_train._finish()
    trainer.dataloader_val._finish()
