"""Signals end any command with their exit code and a message."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

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
