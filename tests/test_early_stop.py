"""A training that stops early has ended, also where it is killed before its end is written, or gets more epochs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from method_runs import history
from nifti_files import stored_case

from kitseg import config
from kitseg.models.run_folder import TRAINED_STATE, Run
from kitseg.patches.subjects import StageInput
from kitseg.runtime.device import Machine
from kitseg.training.epochs import missing_epochs, record_raise
from kitseg.training.fit import Training, fit
from kitseg.training.stage_inputs import write_places
from kitseg.training.trainer import settings_of
from kitseg.types import Box, Geometry


@pytest.fixture
def training(tmp_path: Path) -> Training:
    """dual-unet's K on slices of 16 x 16, of which no step changes the weights: its validation never improves."""
    options = ["size.pixels=16", "size.width=1", "size.epochs=9", "size.validate_every=1"]
    still = ["stages.kidneys.stop_after=2", "size.learning_rate=0", "stages.kidneys.batch=2", "trainer.logger=csv"]
    made = config.compose("dual-unet", "tiny", [*options, *still])
    spec, native = (
        config.method_of(made).stages["kidneys"],
        Geometry((4, 16, 16), np.diag([-3.0, -1, 1, 1])[[2, 1, 0, 3]]),
    )
    label = np.zeros(native.shape, np.uint8)
    label[1:3, 4:12, 4:12] = 1
    folders = [stored_case(tmp_path, np.where(label, 200, -100), label, native, n, spec.grid) for n in range(2)]
    folder, place = Run(tmp_path / "run").stage(0, "kidneys"), StageInput(Box((0, 0, 0), native.shape))
    write_places(folder, {folders[0].name: place}, {folders[1].name: place})
    return Training(spec, folder, folders[0].parent, 0, 1, settings_of(made))


def test_a_training_that_stopped_early_goes_on_nowhere(training: Training) -> None:
    folder, machine = training.folder, Machine("cpu")
    fit(training, machine)
    rows = history(folder.path / "history.csv")
    assert len(rows) == 3, "the first epoch is the best, two more improve nothing"
    done = TRAINED_STATE.read(folder.done)
    assert (done.stopped, done.epochs) == (True, 9)
    folder.done.unlink()
    fit(training, machine)
    assert history(folder.path / "history.csv") == rows
    assert TRAINED_STATE.read(folder.done) == done

    run, more = Run(folder.path.parents[1]), replace(training.spec, epochs=20)
    epochs = [{"chain": ["kidneys"], "stages": {"kidneys": {"epochs": n}}} for n in (9, 20)]
    record_raise(run, *epochs)
    assert missing_epochs(run, more, folder) == 0
    TRAINED_STATE.write(folder.done, replace(done, stopped=False))
    assert missing_epochs(run, more, folder) == 11
