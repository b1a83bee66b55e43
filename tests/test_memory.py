"""The memory that a prediction needs, estimated before it starts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from method_runs import untrained
from nifti_files import IPL, save
from torch import nn

from kitseg.errors import UsageError
from kitseg.models.memory import PROGRAM, Need, activation_bytes, check_limit, estimate_need, parse_size, slab_within
from kitseg.models.model import open_model
from kitseg.types import Box, Case, Geometry, Probabilities
from kitseg.volumes.nifti import read_image
from kitseg.volumes.scan import voxel_bytes


def lattice(slices: int) -> Geometry:
    affine = np.array([[0, 0, -1.0, 0], [0, -1.0, 0, 0], [-3.0, 0, 0, 0], [0, 0, 0, 1]])
    return Geometry((slices, 512, 512), affine)


def test_tensors_that_live_at_a_time() -> None:
    """Three additions in a row: an operation's input and output, and the network's own input."""
    assert activation_bytes(lambda x: ((x + 1) + 1) + 1, (1000,)) == 3 * 4000


def test_a_skip_keeps_what_it_joins() -> None:
    assert activation_bytes(lambda x: torch.cat([x, ((x + 1) + 1) + 1]), (1000,)) == (1 + 1 + 2) * 4000


def test_weights_are_not_activations() -> None:
    with torch.device("meta"):
        net = nn.Conv3d(1, 8, 3, padding=1)
    assert activation_bytes(net, (1, 1, 16, 16, 16)) == (1 + 8) * 4 * 16**3


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6e9), ("6 gb", 6e9), ("5.5GiB", 5.5 * 2**30), ("800000kb", 8e8), ("6000000000", 6e9), ("6000 B", 6e3)],
)
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "6 parsecs", "-1GB", "0", "0.5", "1.2.3GB", "9" * 400])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=rf"^--max-memory {re.escape(text)} is not a size.*6GB"):
        parse_size(text)


def test_a_size_of_a_few_bytes_lacks_its_unit() -> None:
    with pytest.raises(UsageError, match=r"^--gpu-memory 24 means 24 bytes.*24GB"):
        parse_size("24", "--gpu-memory")


def test_a_need_beyond_the_limit_is_refused() -> None:
    need = Need((("the program", 700_000_000), ("fine's network", 5_400_000_000)))
    check_limit(need, 6_100_000_000, "case_00000", "raise it")
    with pytest.raises(UsageError, match=r"case_00000 may need 6\.10 GB .* 5\.40.*more than .* 6\.00 GB"):
        check_limit(need, 6_000_000_000, "case_00000", "raise it")


def test_more_slices_need_more_and_so_do_more_members(tmp_path: Path) -> None:
    model = open_model(untrained(tmp_path), "cpu", engine="torch")
    few, many = (estimate_need([model], lattice(slices)) for slices in (100, 200))
    voxels = 100 * 512 * 512
    # two outputs in float32 on 96 × 96 pixels, one of them half as high; on the scan HU in int16, two channels in
    # float16, masks and labels in 5 bytes
    assert many.total - few.total == 100 * 96 * 96 * 6 + voxels * (2 + 4 + 5)
    two = replace(model, stages={0: model.stages[0], 1: model.stages[0]})
    assert estimate_need([two], lattice(100)).total - few.total == voxels * 12


def test_a_mirrored_scan_and_a_mean_of_checkpoints_need_more(tmp_path: Path) -> None:
    """Beside an output its mirrored one, which is also there flipped back, and the sum over the checkpoints."""
    model = open_model(untrained(tmp_path), "cpu", engine="torch")
    scan = Geometry((100, 64, 64), lattice(1).affine)  # so small that a network needs the most

    def data(**changes: Any) -> int:
        stages = {name: replace(stage, **changes) for name, stage in model.chain.items()}
        parts = dict(estimate_need([replace(model, stages={0: stages})], scan).parts)
        return next(size for name, size in parts.items() if name.endswith("data"))

    several = (Path("a"), Path("b"))
    one, output = data(), 4 * 100 * 96 * 96
    assert [data(mirror=True), data(checkpoints=several), data(mirror=True, checkpoints=several)] == [
        one + 2 * output,
        one + output,
        one + 3 * output,
    ]


@pytest.mark.parametrize(("kind", "size"), [(np.int16, 2), (np.uint8, 2), (np.uint16, 4), (np.float64, 4)])
def test_a_scan_needs_the_bytes_of_its_voxels(tmp_path: Path, kind: type, size: int) -> None:
    path = save(tmp_path / "scan.nii.gz", np.zeros((2, 3, 4), kind))
    assert voxel_bytes(Case("scan", path)) == size
    assert read_image(path, "scan").array.itemsize <= size
    model = open_model(untrained(tmp_path), "cpu", engine="torch")
    parts = dict(estimate_need([model], lattice(100), size).parts)
    assert parts["the scan"] == size * 100 * 512 * 512


def test_a_scaled_scan_needs_those_of_a_float(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((2, 3, 4), np.int16), IPL)
    image.header.set_slope_inter(1, -1024)
    nib.save(image, tmp_path / "scan.nii")
    array = read_image(tmp_path / "scan.nii", "scan").array
    assert array.itemsize == voxel_bytes(Case("scan", tmp_path / "scan.nii")) == 4


def test_slabs_of_a_mean_within_a_limit() -> None:
    """Two members of 2 channels, 10 slices of 100 voxels: the mean has 4 kB, a slice needs 14 bytes for each of 200."""
    box = Box((0, 0, 0), (10, 10, 10))
    member = Probabilities(
        np.zeros((2, 10, 10, 10), np.float16), ("foreground", "tumor"), box, lattice(10), lattice(10), "a"
    )
    assert slab_within(None, [member, member], "a") == 16
    assert slab_within(PROGRAM + 4000 + 2800, [member, member], "a") == 1
    assert slab_within(PROGRAM + 4000 + 3 * 2800 + 1, [member, member], "a") == 3
    with pytest.raises(UsageError, match=r"a may need .*the mean.*--max-memory.*raise it"):
        slab_within(PROGRAM + 4000 + 2799, [member, member], "a")
