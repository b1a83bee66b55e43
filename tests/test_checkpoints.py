"""Checkpoints that can't be read, restarts beside a running training, signals and ranks between two sessions."""

from __future__ import annotations

import os
import pickle
import signal
import warnings
import zipfile
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from kitseg import config
from kitseg.errors import KitsegError
from kitseg.labels import KITS19
from kitseg.models.run_folder import Run, StageFolder
from kitseg.runtime import locks as claim
from kitseg.runtime import signals
from kitseg.runtime.device import Machine
from kitseg.runtime.locks import folder_lock
from kitseg.splits import Fold, Split, write_split
from kitseg.training import checkpoints
from kitseg.training.callbacks import EpochSoFar
from kitseg.training.checkpoints import BestCheckpoints, LastCheckpoint, start_of
from kitseg.training.plan import Start, claim_run


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    """A stage with a whole checkpoint, and a whole one before it."""
    made = StageFolder(tmp_path)
    torch.save({"epoch": 1}, made.previous)
    torch.save({"epoch": 2}, made.last)
    return made


def with_state(path: Path, state: bytes) -> None:
    """Put other bytes where a checkpoint's objects are, with the checksum that belongs to them."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, state if name.endswith("data.pkl") else part)


@pytest.mark.parametrize(
    "state",
    [
        b"\x80\x02R.",  # a call without a function: IndexError
        b"\x80\x02h\x05.",  # the fifth of no objects: KeyError
        b"",  # EOFError
        pickle.dumps(print),  # a warning, then UnpicklingError
    ],
)
def test_whatever_a_damaged_checkpoint_raises_the_one_before_is_taken(
    folder: StageFolder, state: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    with_state(folder.last, state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start_of(folder) == folder.previous
    assert "training resumes from the one before it" in " ".join(capsys.readouterr().err.split())


def test_a_damaged_part_is_not_loaded(folder: StageFolder, capsys: pytest.CaptureFixture[str]) -> None:
    content = folder.last.read_bytes()
    at = content.index(b"epoch")
    folder.last.write_bytes(content[:at] + b"Epoch" + content[at + 5 :])
    assert start_of(folder) == folder.previous
    assert "data.pkl is damaged" in capsys.readouterr().err


def trainer() -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)


def test_a_signal_after_the_last_epoch_ends_the_training(folder: StageFolder) -> None:
    last = LastCheckpoint(folder, BestCheckpoints(folder.best), 60, None)
    with signals.interruptible():
        signals.defer(True)
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(SystemExit) as end:
            last.on_train_end(trainer(), pl.LightningModule())
        assert end.value.code == 128 + signal.SIGUSR1


def test_a_validation_is_broken_off_only_if_it_goes_on_for_long(
    folder: StageFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = LastCheckpoint(folder, BestCheckpoints(folder.best), 60, None)
    with signals.interruptible():
        signals.defer(True)
        monkeypatch.setattr(checkpoints, "LONGEST", 0.0)
        last.on_validation_batch_end(trainer(), pl.LightningModule())
        os.kill(os.getpid(), signal.SIGUSR1)
        monkeypatch.setattr(checkpoints, "LONGEST", 100.0)
        last.on_validation_batch_end(trainer(), pl.LightningModule())
        monkeypatch.setattr(checkpoints, "LONGEST", 0.0)
        with pytest.raises(signals.Stopped) as end:
            last.on_validation_batch_end(trainer(), pl.LightningModule())
        assert end.value.code == 128 + signal.SIGUSR1


@pytest.mark.parametrize(
    ("others", "ends"),
    [([signal.SIGUSR1, None], signal.SIGUSR1), ([signal.SIGTERM, signal.SIGUSR1], signal.SIGUSR1), ([None], None),
     ([None, signal.SIGTERM], signal.SIGTERM)],
)  # fmt: skip
def test_a_rank_that_no_signal_has_reached_ends_by_that_of_the_others(
    folder: StageFolder, others: list[int | None], ends: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank asks SLURM to queue the job again if it ends by SIGUSR1, which may reach the others before."""
    monkeypatch.setattr(checkpoints, "of_all_ranks", lambda mine: [mine, *others])
    last = LastCheckpoint(folder, BestCheckpoints(folder.best), 60, None)
    code = None
    try:
        last.on_train_end(trainer(), pl.LightningModule())
    except signals.Stopped as end:
        code = end.code
    assert code == (ends and 128 + ends)


@pytest.mark.parametrize(("ranks", "patches", "warned"), [(2, 3, True), (1, 3, False), (2, 0, False)])
def test_other_ranks_in_the_middle_of_an_epoch(
    ranks: int, patches: int, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    so_far = EpochSoFar(seed=0)
    so_far.load_state_dict({str(rank): {"loss": 1.0, "patches": patches, "buffers": []} for rank in range(ranks)})
    so_far.on_train_start(trainer(), pl.LightningModule())
    assert ("epoch 0 was started with 2 ranks and resumes with 1" in capsys.readouterr().err) == warned


def test_a_restart_leaves_a_living_training_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "HEARTBEAT", 0.1)
    split, run = Split((Fold(("a",), ("b",)),), KITS19), Run(tmp_path / "run")
    write_split(split, tmp_path / "splits.json")
    made = config.compose("two-phase", "tiny", [])
    claim_run(run, made, split)
    start = Start(made, run, 0, tmp_path / "splits.json", tmp_path, Machine())
    stage = run.stage(0, "coarse").path
    with folder_lock(stage, "training"):
        for every_fold, only in ((False, None), (True, None), (False, "coarse")):
            with pytest.raises(KitsegError, match=r"coarse: process \d+ on \S+ is writing there"):
                start.restart(only, every_fold)
            assert stage.exists()
    assert start.restart("coarse") == [stage.with_name("coarse.old-1")]
