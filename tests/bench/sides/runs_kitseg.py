"""Runs with untrained checkpoints, for the time and memory of predictions: runs_kitseg.py RUNS METHOD CHECKPOINTS.

A real run of the same name in the folder is left alone.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

import kitseg
from kitseg import config, trust
from kitseg.runtime.files import write_json
from kitseg.stages.model import build_model

run, method, checkpoints = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if not run.exists():
    configuration = config.compose(method, "paper")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(trust.dump(configuration))
    about = {"schema": 1, "kitseg": kitseg.__version__, "phantom": False, "cases": ["case_00000"]}
    (run / "run.json").write_text(json.dumps(about))
    for name, spec in config.method_of(configuration).stages.items():
        best = run / "fold_0" / name / "best"
        best.mkdir(parents=True)
        rows = []
        for number in range(checkpoints):
            torch.manual_seed(number)
            path = best / f"{number:04d}-0.5000.ckpt"
            torch.save({"state_dict": build_model(spec).state_dict()}, path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            rows.append({"file": f"best/{path.name}", "val_score": 0.5, "sha256": digest})
        write_json(best.parent / "done.json", 1, {"checkpoints": rows, "threshold": None})
