"""Ctrl-C, SIGTERM and SIGUSR1 end a command within seconds, whatever it is doing; a training saves its state first.

A cluster sends SIGTERM, or SIGUSR1 some time before a job's limit (``#SBATCH --signal=USR1@300``).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from types import FrameType
from typing import NoReturn

from kitseg.runtime import launcher
from kitseg.runtime.console import print_error

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
PATIENCE = 3.0  # seconds that a command has to end in order


class Stopped(SystemExit):
    """A signal has asked the command to end; the code is 128 + its number, as in a shell."""

    code: int


class _Request:
    """The signal that came, and when; whether it waits for the end of a training step, and whether SLURM is asked."""

    number: int | None = None
    since = 0.0
    deferred = False
    requeues = False


def interrupted() -> bool:
    """Whether a signal has asked this process to end."""
    return _Request.number is not None


def received() -> int | None:
    """The number of the signal that has asked this process to end, if one has."""
    return _Request.number


def waiting() -> float:
    """Seconds since a signal asked this process to end; 0 where none has."""
    return 0.0 if _Request.number is None else time.monotonic() - _Request.since


def defer(on: bool) -> None:
    """From now on SIGTERM and SIGUSR1 are only remembered, until ``end_training``; or no longer."""
    _Request.deferred = on


def raise_again() -> None:
    """Raise ``Stopped`` again where a library has made an error of its own of it."""
    if _Request.number is not None:
        raise Stopped(128 + _Request.number)


def end_training(number: int) -> NoReturn:
    """End after the state is saved, by a signal that may have reached another rank only."""
    raise Stopped(128 + number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, a signal raises ``Stopped``, so that what was begun is cleaned up on the way out.

    Where that takes too long, as in a long computation outside of Python, the process ends all the same: files have
    their names only when they are whole.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    receiver, sender = socket.socketpair()  # Windows knows no pipe that doesn't block
    sender.setblocking(False)
    wakeup, over = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False), threading.Event()
    threading.Thread(target=_watch, args=(receiver, over), daemon=True).start()
    try:
        yield
    except Stopped as stopped:
        if any(signal.getsignal(number) is signal.SIG_IGN for number in SIGNALS):
            end_now(stopped.code)  # libraries take seconds to clean up at exit
        _report(stopped.code)
        raise
    finally:
        over.set()
        _Request.number, _Request.deferred = None, False
        signal.set_wakeup_fd(wakeup)
        sender.close()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def requeued() -> Iterator[None]:
    """The SLURM job that this process is, if it is one, is queued again when SIGUSR1 ends it inside."""
    _Request.requeues = True
    try:
        yield
    except Stopped as stopped:
        _requeue_after(stopped.code)
        raise
    finally:
        _Request.requeues = False


@contextmanager
def blocked(*numbers: signal.Signals) -> Iterator[None]:
    """Inside, processes start that ignore these signals, which a terminal or a cluster sends to all; not on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def handle(number: int, frame: FrameType | None) -> None:
    """Handle a signal: raise ``Stopped``, once, or remember it for the end of a training step."""
    if _Request.number is None:
        _Request.since = time.monotonic()
    _Request.number = number
    if _Request.deferred and number != signal.SIGINT:
        return
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # cleaning up is not interrupted
    raise Stopped(128 + number)


def ask_to_end(number: int = signal.SIGTERM) -> None:
    """Send this process a signal, from any of its threads; Windows's ``os.kill`` would end it at once."""
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        os.kill(os.getpid(), number)


def end_now(code: int, reason: str | None = None) -> NoReturn:
    """End this process and those that it started with multiprocessing, without any cleaning up; see ``requeued``."""
    _requeue_after(code)
    for child in active_children():
        child.kill()
    _report(code, reason)
    sys.stdout.flush()
    os._exit(code)


def _watch(receiver: socket.socket, over: threading.Event) -> None:
    """End the process where the main thread doesn't; the interpreter writes each signal to ``receiver`` at once."""
    while byte := receiver.recv(1):
        number = byte[0]
        ours = number in SIGNALS and signal.getsignal(number) in (handle, signal.SIG_IGN)
        deferred = _Request.deferred and number != signal.SIGINT
        if ours and not deferred and not over.wait(PATIENCE):
            end_now(128 + number)
    receiver.close()


def _report(code: int, reason: str | None = None) -> None:
    """One line for all ranks of a machine."""
    if launcher.local_rank() == 0:
        name = signal.Signals(code - 128).name if reason is None else ""
        print_error(reason or f"stopped by {name}: written files are whole; run the same command again to resume")


def _requeue_after(code: int) -> None:
    """Queue the job again, once, where that is asked for and SIGUSR1 has ended this process, the first one."""
    if _Request.requeues and code == 128 + getattr(signal, "SIGUSR1", 0) and launcher.rank() == 0:
        _Request.requeues = False
        _requeue()


def _requeue() -> None:
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID", ""))
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{job}_{task}" if task else job
    if re.fullmatch(r"\d+(_\d+)?", name):
        try:
            subprocess.run(["scontrol", "requeue", name], check=True)
            print_error(f"SLURM queues job {name} again, which resumes the training")
        except (OSError, subprocess.CalledProcessError) as error:
            print_error(f"job {name} could not be queued again: {error}")
