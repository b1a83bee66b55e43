"""Failures of a training: signals, damaged checkpoints, NaN losses, out of memory, a full disk. The error is clear, and
running the same command again gives the result of an undisturbed training.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Result, kitseg, kitseg_process, once
from kill_storm import contents, differences, leftovers, storm

from kitseg.errors import KitsegError
from kitseg.patches import datamodule
from kitseg.patches.queue import PatchQueue
from kitseg.runtime.locks import folder_lock
from kitseg.training.fit import in_settings, naming_own_parts

slow = pytest.mark.slow
thorough = pytest.mark.skipif(os.environ.get("KITSEG_ALL") != "1", reason="one more of its kind, with KITSEG_ALL=1")
#: One stage with dropout in seconds; it saves after every batch.
QUICK = (
    "train", "--method=two-phase", "--size=tiny", "--stage=coarse", "--epochs=2", "--device=cpu", "--jobs=1",
    "--save-every=0", "--set=size.slice_factor=4", "--set=size.inplane_factor=8", "--set=size.vnet_width=4",
    "--set=size.patch=[16,32,32]", "--set=size.coarse_samples=3", "--set=size.validate_every=1",
    "--set=size.dropout=0.3",
)  # fmt: skip
COARSE = Path("runs/two-phase-tiny/fold_0/coarse")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """A working folder with a training that nothing disturbed."""

    def make(folder: Path) -> None:
        (folder / "work").mkdir()
        (folder / "work" / "data").symlink_to(phantoms / "data")
        done = kitseg(folder / "work", *QUICK)
        assert done.code == 0, done.text

    return once(tmp_path_factory, "faults-whole", make) / "work"


@pytest.fixture
def folder(tmp_path: Path, whole: Path) -> Path:
    """The same before its training, the cases preprocessed."""
    return untrained(whole, tmp_path / "new")


@pytest.fixture(scope="session")
def ended(tmp_path_factory: pytest.TempPathFactory, whole: Path) -> Path:
    """The same with a training that a signal has ended in the middle of an epoch."""

    def make(folder: Path) -> None:
        end_in_an_epoch(untrained(whole, folder / "work"))

    return once(tmp_path_factory, "faults-ended", make) / "work"


@pytest.fixture
def half(tmp_path: Path, ended: Path) -> Path:
    """A copy of that."""
    return shutil.copytree(ended, tmp_path / "half", symlinks=True)


def untrained(whole: Path, to: Path) -> Path:
    """A copy of a working folder without its runs."""
    return shutil.copytree(whole, to, symlinks=True, ignore=shutil.ignore_patterns("runs"))


def when(ready: Callable[[], object], act: Callable[[], object]) -> None:
    """Act once, as soon as a condition holds."""

    def watch() -> None:
        end = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < end
            time.sleep(0.01)
        act()

    threading.Thread(target=watch, daemon=True).start()


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def end_in_an_epoch(folder: Path, number: signal.Signals = signal.SIGTERM) -> Result:
    """Train until two checkpoints are there, and send a signal."""
    when((folder / COARSE / "previous.ckpt").exists, send(number))
    result = kitseg(folder, *QUICK)
    assert result.code == 128 + number, result.text
    state = torch.load(folder / COARSE / "last.ckpt", weights_only=True)
    assert state["epoch"] == 0
    assert 1 < state["global_step"] < 15, "in the middle of the first epoch"
    assert state["StageData"] == {"given": state["global_step"]}
    return result


def check_resumes(folder: Path, whole: Path, *options: str) -> Result:
    """The same command ends with the same weights, scores and history, and leaves nothing behind."""
    again = kitseg(folder, *QUICK, *options)
    assert again.code == 0, again.text
    assert differences(whole, folder) == []
    assert leftovers(folder) == []
    return again


# --- signals ---------------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=thorough)])
def test_a_signal_saves_and_ends(folder: Path, whole: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    assert f"stopped by {number.name}" in end_in_an_epoch(folder, number).text
    assert signal.getsignal(number) is before
    assert "coarse: resumes" in check_resumes(folder, whole).text


@slow
def test_a_slurm_job_is_queued_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "79")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    result = end_in_an_epoch(folder, signal.SIGUSR1)
    assert (tmp_path / "asked").read_text() == "requeue 77_3\n"
    assert "queues job 77_3 again" in result.text
    assert not list(folder.rglob("hpc_ckpt*"))


@slow
def test_ctrl_c_ends_at_once(folder: Path) -> None:
    process = kitseg_process(folder, *QUICK)
    try:
        while not (folder / COARSE / "previous.ckpt").exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=30)[0]
    finally:
        process.kill()
    assert process.returncode == 130, printed
    assert "stopped by SIGINT" in printed
    assert not (folder / COARSE / "done.json").exists(), "it ended before the stage was trained"
    assert "Traceback" not in printed
    assert not [*folder.rglob(".partial*"), *folder.rglob(".kitseg*.lock")]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@slow
@pytest.mark.parametrize("damage", [flip, pytest.param(cut, marks=thorough)])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    half: Path, whole: Path, damage: Callable[[Path], None]
) -> None:
    damage(half / COARSE / "last.ckpt")
    text = " ".join(check_resumes(half, whole).text.split())
    assert f"{COARSE}/last.ckpt: can't be loaded" in text
    assert "training resumes from the one before it" in text


@slow
def test_no_checkpoint_can_be_read(half: Path) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        cut(half / COARSE / name)
    before = (half / COARSE / "last.ckpt").read_bytes()
    result = kitseg(half, *QUICK)
    assert result.code == 1
    assert "last.ckpt: can't be loaded" in result.text
    assert "--restart" in result.text
    assert (half / COARSE / "last.ckpt").read_bytes() == before


@slow
def test_two_trainings_do_not_share_a_folder(half: Path) -> None:
    with folder_lock(half / COARSE, "training"):
        result = subprocess.run(
            ["python", "-m", "kitseg", *QUICK], cwd=half, capture_output=True, text=True, check=False
        )
    assert result.returncode == 1
    assert "is writing there" in result.stderr


# --- numbers, memory, processes --------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize(
    ("change", "words", "kept"),
    [
        ("size.learning_rate=1e30", "the loss became NaN or infinite in epoch 0, batch 1 (case_0000", True),
        ("stages.coarse.module.optimizer.eps=0", "the weights became NaN or infinite in epoch 0", False),  # 0 / 0
    ],
)
def test_nan_losses_and_weights(folder: Path, change: str, words: str, kept: bool) -> None:
    """The batch's cases are named, and the last checkpoint is a good one."""
    result = kitseg(folder, *QUICK, f"--set={change}")
    assert result.code == 1, result.text
    assert words in result.text
    assert "stages.*.module.optimizer.lr" in result.text
    last = folder / COARSE / "last.ckpt"
    assert last.exists() == kept
    if kept:
        assert all(weight.isfinite().all() for weight in torch.load(last, weights_only=True)["state_dict"].values())


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory. Use fewer --workers"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GB"),
            "out of GPU memory. Use --set",
        ),
        (RuntimeError("alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"), "micro_batch_size=1"),
        (RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly"), "with fewer --workers"),
        (OSError(28, "No space left on device"), "the disk is full. Free some space"),
    ],
)
def test_an_error_names_the_setting_that_helps(tmp_path: Path, error: Exception, words: str) -> None:
    with pytest.raises(KitsegError) as found, in_settings(tmp_path):
        raise error
    assert words in str(found.value)
    assert str(found.value).startswith(f"{tmp_path}: ")


def test_an_error_of_an_own_part_is_one_line_with_a_log(tmp_path: Path) -> None:
    def train(target: str) -> None:
        with naming_own_parts({"module": {"net": {"_target_": target}}}, tmp_path):
            raise ValueError("shapes\ndiffer")

    with pytest.raises(KitsegError, match=r"mine\.Net failed: ValueError: shapes differ\. See .*error\.log"):
        train("mine.Net")
    assert "Traceback" in (tmp_path / "error.log").read_text()
    with pytest.raises(ValueError, match="shapes"):
        train("kitseg.nets.vnet.VNet")


def test_another_error_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), in_settings(tmp_path):
        raise RuntimeError("shapes cannot be multiplied")


@slow
@pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="loader processes don't inherit what is patched"
)
def test_a_killed_loader_process(folder: Path, whole: Path) -> None:
    take = PatchQueue.__getitem__
    this = os.getpid()

    def killed(queue: PatchQueue, address: tuple[int, int]) -> object:
        if os.getpid() != this and (folder / COARSE / "last.ckpt").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return take(queue, address)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PatchQueue, "__getitem__", killed)
        result = kitseg(folder, *QUICK, "--workers=1")
    assert result.code == 1, result.text
    assert "loader process was killed" in result.text
    assert "fewer --workers" in result.text
    check_resumes(folder, whole, "--workers=1")


@slow
def test_too_little_shared_memory(folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    little = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(datamodule.shutil, "disk_usage", lambda path: little)
    text = " ".join(check_resumes(folder, whole, "--workers=1").text.split())
    assert "continues with --workers 0" in text
    assert "0 MB are free" in text


# --- disk ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=False)


def fill(disk: Path, leave: int) -> Path:
    """Fill a disk but for so many bytes."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - leave))
    return ballast


@slow
def test_a_full_disk_ends_a_training(folder: Path, whole: Path, small_disk: Path) -> None:
    (folder / "runs").symlink_to(small_disk)
    ballast = fill(small_disk, leave=30_000_000)  # room for two checkpoints, not for three
    result = kitseg(folder, *QUICK)
    assert result.code == 1, result.text
    assert "(the disk is full). Free some space" in result.text
    assert "Traceback" not in result.text
    assert not list(small_disk.rglob(".partial*"))
    ballast.unlink()
    (folder / "runs").unlink()
    shutil.copytree(small_disk, folder / "runs")
    check_resumes(folder, whole)


@slow
def test_a_full_disk_ends_preprocessing(folder: Path, whole: Path, small_disk: Path) -> None:
    shutil.rmtree(folder / "preprocessed")
    (folder / "preprocessed").symlink_to(small_disk)
    when(lambda: len(list(small_disk.glob("*/*/meta.json"))) >= 2, lambda: fill(small_disk, leave=1000))
    options = (*QUICK[1:3], "--jobs=1", *(option for option in QUICK if option.startswith("--set")))
    result = kitseg(folder, "preprocess", *options)
    assert result.code == 1, result.text
    assert "(the disk is full). Free some space" in result.text
    (small_disk / "ballast").unlink()
    again = kitseg(folder, "preprocess", *options)
    assert again.code == 0, again.text
    (folder / "preprocessed").unlink()
    shutil.copytree(small_disk, folder / "preprocessed")
    same = {name: content for name, content in contents(whole) if name.startswith("preprocessed")}
    assert {name: content for name, content in contents(folder) if name.startswith("preprocessed")} == same


@slow
def test_a_full_disk_ends_a_prediction(trained: Path, small_disk: Path, tmp_path: Path) -> None:
    ballast = fill(small_disk, leave=1000)
    command = ("predict", "test", "--model=runs/two-phase-tiny", "--device=cpu", "--engine=torch")
    result = kitseg(trained, *command, f"--output={small_disk}/out")
    assert result.code == 1, result.text
    assert "the disk is full. Free some space" in result.text
    ballast.unlink()
    again = kitseg(trained, *command, f"--output={small_disk}/out")
    assert again.code == 0, again.text
    assert kitseg(trained, *command, f"--output={tmp_path}/out").code == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
    assert len(names) == 2
    for name in names:
        assert (small_disk / "out" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


# --- kills -----------------------------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("verb", ["preprocess", pytest.param("train", marks=thorough)])
def test_a_storm_of_kills(whole: Path, tmp_path: Path, verb: str) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "data").symlink_to(whole / "data")
    changes = tuple(option for option in QUICK if option.startswith("--set"))
    command = QUICK if verb == "train" else ("preprocess", *QUICK[1:3], "--jobs=1", *changes)
    found = storm(verb, command, tmp_path / "start", tmp_path, kills=2, draw=random.Random(1))
    assert found == (2, [])
