"""Signals end any command with their exit code and a message."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import kitseg

from kitseg.cli import learn
from kitseg.runtime.signals import Stopped

WAIT = """
import time
from kitseg.runtime.signals import interruptible
with interruptible():
    print("ready", flush=True)
    time.sleep(20)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_command_in_order(number: signal.Signals) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", WAIT], text=True, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        printed = process.communicate(timeout=10)[1]
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}" in printed


BUSY = """
import ctypes, signal, threading
from kitseg.runtime import signals
signals.PATIENCE = 0.1
with signals.interruptible(), signals.requeued():
    sent = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), signal.SIGNAL))
    sent.start()
    ctypes.CDLL(None).sleep(20)  # as a pass of a network, which Python can't end
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that notes what SLURM's scontrol was asked for."""
    scontrol, asked = tmp_path / "bin" / "scontrol", tmp_path / "asked"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    asked.touch()
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return asked


@pytest.mark.parametrize(("name", "asked"), [("SIGUSR1", "requeue 77\n"), ("SIGTERM", "")])
def test_a_job_that_can_not_end_in_order_is_queued_again(slurm: Path, name: str, asked: str) -> None:
    done = subprocess.run([sys.executable, "-c", BUSY.replace("SIGNAL", name)], capture_output=True, timeout=60)
    assert done.returncode == 128 + signal.Signals[name]
    assert slurm.read_text() == asked


def test_a_job_is_queued_again_in_the_cross_validation_after_its_folds(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def validate(*_: object, **__: object) -> None:
        raise Stopped(128 + signal.SIGUSR1)

    monkeypatch.setattr(learn, "_trainings", lambda *_: iter(()))
    monkeypatch.setattr(learn, "cross_validate", validate)
    assert kitseg(tmp_path, "train", "--size=tiny", "--device=cpu").code == 0
    assert slurm.read_text() == ""
    assert kitseg(tmp_path, "train", "--size=tiny", "--device=cpu", "--fold=all").code == 128 + signal.SIGUSR1
    assert slurm.read_text() == "requeue 77\n"
