"""The cases as a raw data set of nnU-Net, with its fingerprint and plan: prepare_nnunetv2.py WORK."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments

if __name__ == "__main__":  # it starts processes
    work = Path(sys.argv[1])
    raw = work / "nnunet" / "raw" / "Dataset001_Kidneys"
    shutil.rmtree(work / "nnunet", ignore_errors=True)
    for folder in (raw / "imagesTr", raw / "labelsTr", work / "nnunet" / "preprocessed", work / "nnunet" / "results"):
        folder.mkdir(parents=True)
    cases = sorted((work / "data").glob("case_*"))
    for case in cases:
        (raw / "imagesTr" / f"{case.name}_0000.nii.gz").symlink_to(case.resolve() / "imaging.nii.gz")
        (raw / "labelsTr" / f"{case.name}.nii.gz").symlink_to(case.resolve() / "segmentation.nii.gz")
    about = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "kidney": 1, "tumor": 2},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(about))
    extract_fingerprints([1], num_processes=2)
    plan_experiments([1])
