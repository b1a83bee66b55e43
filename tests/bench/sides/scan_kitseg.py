"""A case stretched or cut to 512 x 512 x SLICES: scan_kitseg.py WORK SLICES OUT."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from kitseg.types import Geometry
from kitseg.volumes.nifti import read_image, write_image
from kitseg.volumes.resample import nearest

EXTENT, THINNEST = 417.0, 0.5  # mm: from the diaphragm to the pelvis, and a slice distance in a KiTS19 scan of 1059

work, slices, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
if not out.exists():
    scan = read_image(sorted((work / "data").glob("case_*"))[0] / "imaging.nii.gz", "case")
    _, y, x = scan.geometry.spacing
    z = max(THINNEST, EXTENT / slices)
    image = nearest(scan.array, (slices, 512, 512))
    affine = np.array([[0, 0, -x * scan.array.shape[2] / 512, 0], [0, -y * scan.array.shape[1] / 512, 0, 0],
                       [-z, 0, 0, 0], [0, 0, 0, 1]])  # fmt: skip
    write_image(out, image, Geometry(image.shape, affine))
