"""Signals that ask a training to end: it saves what it has and ends, and the same command goes on.

A cluster sends SIGTERM, or SIGUSR1 some time before a job's limit (``#SBATCH --signal=USR1@120``). Python's main thread
hears them. Where a training is in the middle of a step, it ends after that step; elsewhere nothing has to be saved, and
the process ends at once.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from kitseg.errors import KitsegError
from kitseg.runtime import console
from kitseg.runtime.device import rank

ENDING = (signal.SIGTERM, signal.SIGUSR1)
CODES = {128 + number: number for number in ENDING}  # the exit code that each leads to
PAUSE, PATIENCE = 0.1, 3.0  # seconds: between two looks at a command; for its own end


class Listener:
    """Ends this process when a signal asks for it, or, inside ``later``, remembers it until ``obey``."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.waits = False

    def listen(self) -> None:
        """Hear the signals, also where somebody else (Lightning) has begun to."""
        for number in ENDING:
            signal.signal(number, self._hear)

    @contextmanager
    def later(self) -> Iterator[None]:
        """Inside, a signal is only remembered."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def obey(self) -> None:
        """End the process, which a signal has asked for; it may have reached another rank only.

        A machine's first rank alone says so by its code: Lightning kills that one where another ends with an error.
        """
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        raise SystemExit(128 + (self.asked or signal.SIGTERM) if first else 0)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        if not self.waits:
            self.obey()


listener = Listener()


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 end a training in order, with 128 + the signal's number as exit code.

    After SIGUSR1 the SLURM job that this is, if it is one, is queued again.
    """
    before = {number: signal.getsignal(number) for number in ENDING}
    listener.asked = None
    listener.listen()
    try:
        yield
    except SystemExit as end:
        if rank() == 0 and end.code in CODES:
            _part(CODES[int(end.code)])
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def call(command: Sequence[str], environment: Mapping[str, str], look: Callable[[], None]) -> int:
    """Run a command and give its exit code; signals that ask this process to end are passed on to it.

    What ``look`` raises, called now and then, ends it too, unless it ends by itself then: it knows better why. Its
    stdin stays open while this process lives.

    Raises:
        KitsegError: ``look`` has. SystemExit: this process or the command was asked to end.
    """
    told = False
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
    try:
        with listener.later():
            while process.poll() is None:
                _look(look, process)
                if listener.asked is not None and not told:
                    process.send_signal(listener.asked)
                    told = True
                time.sleep(PAUSE)
    finally:
        _end(process)
    if listener.asked is not None:
        listener.obey()
    if process.returncode in CODES:
        raise SystemExit(process.returncode)
    return process.returncode


def _look(look: Callable[[], None], process: subprocess.Popen[bytes]) -> None:
    try:
        look()
    except KitsegError:
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        if process.poll() is None:
            raise


def _end(process: subprocess.Popen[bytes]) -> None:
    """After Ctrl-C, which the command hears from the terminal, too, let it end; then end it."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    if process.poll() is None:
        process.kill()
        process.wait()


def _part(asked: signal.Signals) -> None:
    """Say what the signal has led to, and queue the SLURM job again where it was meant so."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", ""))
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{job}_{task}" if task else job
    if asked == signal.SIGUSR1 and re.fullmatch(r"\d+(_\d+)?", name):
        try:
            subprocess.run(["scontrol", "requeue", name], check=True)
            console.print_line(f"ended by {asked.name}: SLURM queues job {name} again, which goes on")
            return
        except (OSError, subprocess.CalledProcessError) as error:
            console.print_error(f"job {name} could not be queued again: {error}")
    console.print_line(f"ended by {asked.name}: the same command goes on, without --restart")
