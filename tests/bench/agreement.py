"""Labels by kitseg's kernels beside PyTorch's in float32: ``python agreement.py MODEL COUNT SCAN...``, then JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import kitseg
from kitseg.labels import TUMOR
from kitseg.models.postprocessing import clean
from kitseg.volumes.arrays import scan_from


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float | None:
    """Dice of two masks; None where both are empty."""
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else None


name, count, *paths = sys.argv[1:]
models = [kitseg.load_model(name, device="cpu", engine=engine, precision="f32") for engine in ("torch", "winograd")]
rows = []
for path in paths[: int(count)]:
    scan = scan_from(Path(path), None)
    plain, found = (clean(model.predict_proba(scan)[0], scan, model.steps) for model in models)
    row = {"changed": int((plain != found).sum()), "voxels": plain.size, "foreground": int((plain > 0).sum())}
    row |= {"dice": dice(plain > 0, found > 0), "tumor_dice": dice(plain == TUMOR, found == TUMOR)}
    rows.append(row)
    print(Path(path).parent.name, row, file=sys.stderr, flush=True)
least = {key: min((row[key] for row in rows if row[key] is not None), default=None) for key in ("dice", "tumor_dice")}
most = max(row["changed"] / row["voxels"] for row in rows)
print(json.dumps({"model": name, "scans": len(rows), "most_changed_%": 100 * most, **least,
                  "with_tumor": sum(row["tumor_dice"] is not None for row in rows), "rows": rows}))  # fmt: skip
