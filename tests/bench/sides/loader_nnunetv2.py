"""Patches a second from nnU-Net's data loader: loader_nnunetv2.py WORK [--augment]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from side import rate, say

PATCH = [64, 192, 192]
torch.set_num_threads(1)
folder = Path(sys.argv[1]) / "nnunet" / "preprocessed" / "Dataset001_Kidneys"
plans = json.loads((folder / "nnUNetPlans.json").read_text())
plans["configurations"]["3d_fullres"]["patch_size"] = PATCH
dataset = json.loads((folder / "dataset.json").read_text())
labels = PlansManager(plans).get_label_manager(dataset)
size, transforms = PATCH, None
if "--augment" in sys.argv:
    plans["continue_training"] = False  # what its command adds
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, dataset, torch.device("cpu"))
    rotation, flat, size, mirror = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    transforms = trainer.get_training_transforms(
        PATCH, rotation, None, mirror, flat, use_mask_for_norm=[False], foreground_labels=labels.foreground_labels
    )
cases = nnUNetDatasetBlosc2(str(folder / "nnUNetPlans_3d_fullres"))
loader = nnUNetDataLoader(cases, 2, size, PATCH, labels, 0.33, transforms=transforms)
say(rate(lambda: next(loader), 2))
