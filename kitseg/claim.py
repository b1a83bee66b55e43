"""One process at a time writes into a folder."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from kitseg.errors import KitsegError, in_words
from kitseg.screen import say

HEARTBEAT, LEASE = 2.0, 60.0  # seconds: how often a lock is refreshed, and after how long without that it is dead


@contextmanager
def claimed(folder: Path, what: str, part: str = "", wait: float = 0.0) -> Iterator[None]:
    """Keep a folder to this process while it writes there; ``what`` it writes is for the error.

    A hidden lock file in the folder names the process and its host, and is refreshed while that lives. The lock of a
    process that is dead, or on another host silent for a minute, is taken over. ``part``, such as ``2/8``: parts of
    the same work write side by side. ``wait``: seconds that another process may have to finish.

    Raises:
        KitsegError: another process writes there, or the folder can't be written to.
    """
    own = folder / (f".kitseg.{part.replace('/', '-of-')}.lock" if part else ".kitseg.lock")
    beside = f"-of-{part.partition('/')[2]}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KitsegError(in_words(folder, error)) from error
    with _locked(own, what, wait):
        for other in sorted(set(folder.glob(".kitseg*.lock")) - {own}):
            if not (part and other.name.endswith(beside)):
                with _locked(other, what, wait):  # whose process is dead, or it is an error
                    pass
        yield


@contextmanager
def _locked(path: Path, what: str, wait: float) -> Iterator[None]:
    """Hold one lock file; a lock that is refreshed while this one looks is alive."""
    lock = SoftFileLease(path, lease_duration=LEASE, heartbeat_interval=HEARTBEAT, on_compromise=_give_way)
    owner, seen, patience = lock.owner, _changed(path), time.monotonic() + wait
    holder = f"process {owner.pid} on {owner.hostname}" if owner else "another process"

    def alive() -> bool:
        return _changed(path) != seen and time.monotonic() > patience

    try:
        lock.acquire(timeout=wait + LEASE + HEARTBEAT, poll_interval=0.1, cancel_check=alive)
    except Timeout as error:
        remedy = "Wait until it ends, or choose another folder."
        raise KitsegError(f"{path.parent}: {holder} is writing there, so no {what} can be written. {remedy}") from error
    except OSError as error:
        raise KitsegError(in_words(path.parent, error)) from error
    if owner and not wait:
        say(f"{path.parent}: taken over from {holder}, which has ended")
    try:
        yield
    finally:
        lock.release()


def _changed(path: Path) -> int | None:
    """When a file was changed, in nanoseconds; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _give_way(loss: LeaseCompromise) -> None:
    """End where another process has taken over the lock, as while this one was suspended."""
    if loss.reason == "owner-changed":
        os.kill(os.getpid(), signal.SIGTERM)
