"""What Windows and macOS lack, simulated: no signal 0, no signal masks, no user ids, no core masks; and Apple's GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kitseg.cli.plan import memory_here
from kitseg.errors import UsageError
from kitseg.runtime.device import Machine, torch_device
from kitseg.runtime.files import HOST, atomic_write, is_alive
from kitseg.runtime.signals import blocked
from kitseg.service.work import scratch
from kitseg.training.cost import _measured_on


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``os.kill`` is Ctrl-C or the process's end there, whatever the signal."""
    for module, names in (
        (os, ("getuid", "sched_getaffinity")),
        (signal, ("SIGUSR1", "pthread_sigmask", "SIG_BLOCK", "SIG_UNBLOCK")),
    ):
        for name in names:
            monkeypatch.delattr(module, name)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("os.kill was called"))
    monkeypatch.setattr(sys, "platform", "win32")


@pytest.mark.usefixtures("windows")
def test_a_process_is_not_ended_by_asking_for_it(tmp_path: Path) -> None:
    assert is_alive(str(os.getppid()))
    fresh, old = (tmp_path / f".partial.{HOST}.{number}.a.json" for number in (1, 2))
    for stray in (fresh, old):
        stray.write_text("x")
    os.utime(old, (0, 0))
    with atomic_write(tmp_path / "a.json") as partial:
        partial.write_text("{}")
    assert (fresh.exists(), old.exists(), (tmp_path / "a.json").exists()) == (True, False, True)


def test_a_lost_lock_ends_the_command_in_order() -> None:
    code = """
import os, signal, sys
del signal.SIGUSR1, os.kill
from kitseg.runtime.signals import ask_to_end, interruptible, requeued
sys.platform = "win32"
with interruptible(), requeued():
    try:
        ask_to_end()
    finally:
        print("cleaned up")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "cleaned up\n"), done.stderr
    assert "stopped by SIGTERM: written files are whole" in done.stderr


@pytest.mark.usefixtures("windows")
def test_what_is_absent_is_not_asked_for(tmp_path: Path) -> None:
    with blocked(signal.SIGINT):
        pass
    (tmp_path / "kitseg-serve-1-x").mkdir()
    with scratch(tmp_path) as folder:
        assert folder.is_dir()
    assert 0 <= Machine("cuda").loaders <= 8


def test_an_apple_gpu_is_used_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (torch_device("mps").type, torch_device("auto").type) == ("mps", "cpu")
    assert (Machine("mps").accelerator, Machine("auto").accelerator) == ("mps", "cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match="finds no Apple GPU here; use --device cpu"):
        torch_device("mps")


def test_plans_for_an_apple_gpu_are_not_those_of_a_cuda_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80e9))
    assert [memory_here(device) for device in ("auto", "cuda", "cpu", "mps")] == [80, 80, None, None]
    assert [_measured_on(Machine(device)) for device in ("auto", "cuda", "cpu", "mps")] == [
        "cuda",
        "cuda",
        "cpu",
        "cpu",
    ]
