"""NnU-Net's preprocessing of its default 3D configuration with two workers."""

from __future__ import annotations

from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess

if __name__ == "__main__":  # it starts processes
    preprocess([1], configurations=["3d_fullres"], num_processes=[2])
