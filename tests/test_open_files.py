"""Where few files may be open: more cases than that are prepared, and a store that can't be opened isn't damaged."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from nifti_files import save

from kitseg import config
from kitseg.commands.preprocess import preprocess
from kitseg.errors import InputError, KitsegError
from kitseg.labels import KITS19
from kitseg.measurement.phase import contrast
from kitseg.models.run_folder import Run
from kitseg.runtime.device import Machine
from kitseg.splits import Fold, Split
from kitseg.training.plan import Plan, Unit
from kitseg.training.stage_inputs import prepare
from kitseg.training.trainer import settings_of
from kitseg.types import Case
from kitseg.volumes.store import CaseFiles, is_fresh, open_case, open_guide, store_case

METHOD = config.compose("two-phase", "tiny")
SPEC = config.method_of(METHOD).stages["coarse"]
MANY = 40


@contextmanager
def more_files(count: int) -> Iterator[None]:
    """This process may open ``count`` more files."""
    limits, highest = resource.getrlimit(resource.RLIMIT_NOFILE), max(map(int, os.listdir("/dev/fd")))
    taken = [os.open("/", os.O_RDONLY)]
    while taken[-1] <= highest:  # every number below the limit is in use
        taken.append(os.open("/", os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1 + count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for number in taken:
            os.close(number)


@dataclass(frozen=True)
class Stored:
    """A store of one case under many names."""

    root: Path
    case: Case

    @property
    def folder(self) -> Path:
        return self.root / str(SPEC.grid) / self.case.id

    @property
    def files(self) -> CaseFiles:
        return CaseFiles(self.case, KITS19, contrast)


@pytest.fixture
def stored(tmp_path: Path) -> Stored:
    labels = np.zeros((8, 12, 12), np.uint8)
    labels[2:6, 3:9, 3:9], labels[4, 5, 5] = 1, 2
    image, label = tmp_path / "imaging.nii.gz", tmp_path / "segmentation.nii.gz"
    affine = np.array([[0, 0, -4.0, 0], [0, -4.0, 0, 0], [-4.0, 0, 0, 0], [0, 0, 0, 1]])
    save(image, np.where(labels > 0, 150, -80).astype(np.int16), affine)
    save(label, labels, affine)
    made = Stored(tmp_path / "store", Case("case_00000", image, label))
    assert store_case(made.files, made.folder, SPEC.grid)
    for number in range(1, MANY):
        made.folder.with_name(f"case_{number:05d}").symlink_to(made.folder)
    return made


def test_a_training_is_prepared_from_more_cases_than_files_may_be_open(stored: Stored, tmp_path: Path) -> None:
    names = tuple(f"case_{number:05d}" for number in range(MANY))
    split = Split((Fold(names[5:], names[:5]),), KITS19)
    plan = Plan(
        METHOD,
        config.method_of(METHOD),
        settings_of(METHOD),
        Run(tmp_path / "run"),
        split,
        0,
        stored.root,
        Machine("cpu"),
    )
    with more_files(12):
        prepare(plan, Unit("coarse"))
    assert len(plan.run.read_info().cases) == MANY
    domain = plan.run.read_info().experience
    assert domain is not None
    assert domain.slice_mm == (4, 4)
    assert plan.run.stage(0, "coarse").places.read_text().count('"case_') == MANY


def test_a_store_that_cannot_be_opened_is_not_damaged(stored: Stored, tmp_path: Path) -> None:
    guide = tmp_path / "guide.npy"
    np.save(guide, np.zeros((1, 2, 2, 2), np.float16))
    for count, opened in ((0, open_case), (2, open_case), (0, lambda _: open_guide(guide))):
        with more_files(count), pytest.raises(KitsegError, match="too many files are open") as caught:
            opened(stored.folder)
        assert not isinstance(caught.value, InputError)
        assert str(caught.value).startswith(f"{tmp_path}/")


def test_a_store_that_cannot_be_opened_is_not_made_again(stored: Stored) -> None:
    """Not even the case's own files are opened; the case fails in its own words, and is as it was afterwards."""
    written = (stored.folder / "meta.json").stat()
    with more_files(0):
        assert not is_fresh(stored.files, stored.folder, SPEC.grid)
        with pytest.raises(KitsegError, match="too many files are open") as caught:
            store_case(stored.files, stored.folder, SPEC.grid)
    assert str(caught.value).startswith(f"{stored.folder}/meta.json: ")
    assert (stored.folder / "meta.json").stat() == written
    (outcome,) = preprocess([stored.case], [SPEC.grid], stored.root, KITS19, 1, lambda _: None)
    assert outcome.state == "unchanged"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_a_store_closed_to_its_reader_is_not_made_again(stored: Stored) -> None:
    (stored.folder / "image.npy").chmod(0)
    (outcome,) = preprocess([stored.case], [SPEC.grid], stored.root, KITS19, 1, lambda _: None)
    assert (outcome.state, outcome.error.split(". ")[0]) == ("failed", f"{stored.folder}: permission denied")
