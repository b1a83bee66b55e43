"""One process at a time writes into a folder."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import LeaseCompromise, SoftFileLease, Timeout

from kitseg.errors import KitsegError, format_error
from kitseg.runtime.console import print_plain
from kitseg.runtime.signals import ask_to_end

HEARTBEAT, LEASE = 2.0, 60.0  # seconds: how often a lock is refreshed, and after how long without that it is dead
FOREVER = 1e9  # seconds: the watch decides; with no limit at all filelock reports a deadlock within one thread


@contextmanager
def folder_lock(folder: Path, what: str, part: str = "", wait: float = 0.0) -> Iterator[None]:
    """Lock a folder while this process writes there; ``what`` it writes is for the error.

    A hidden lock file in the folder names the process and its host, and is refreshed while that lives. The lock of a
    process that is dead, or on another host silent for a minute, is taken over. ``part``, such as ``2/8``: those
    without a case in common write side by side. ``wait``: seconds to wait for another process, after a line about it.

    Raises:
        KitsegError: another process writes there, or the folder can't be written to.
    """
    own = folder / (f".kitseg.{part.replace('/', '-of-')}.lock" if part else ".kitseg.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KitsegError(format_error(folder, error)) from error
    with _locked(own, what, wait):
        for other in sorted(set(folder.glob(".kitseg*.lock")) - {own}):
            if _overlap(own.name, other.name):
                with _locked(other, what, wait):  # whose process is dead, or it is an error
                    pass
        yield


def _overlap(lock: str, other: str) -> bool:
    """Whether two locks' parts share cases: parts k/n and j/m take every n-th and every m-th case."""
    one, two = (re.fullmatch(r"\.kitseg\.(\d+)-of-(\d+)\.lock", name) for name in (lock, other))
    if not (one and two):
        return True
    (k, n), (j, m) = (map(int, match.groups()) for match in (one, two))
    return (k - j) % math.gcd(n, m) == 0


@contextmanager
def _locked(path: Path, what: str, wait: float) -> Iterator[None]:
    """Hold one lock file."""
    lock = SoftFileLease(path, lease_duration=LEASE, heartbeat_interval=HEARTBEAT, on_compromise=_give_way)
    watch = _Watch(lock, path, wait)
    try:
        watch.acquire()
    except Timeout as error:
        remedy = f"Wait until it ends, or choose another folder; if it has ended, delete {path.name} there."
        raise KitsegError(
            f"{path.parent}: {watch.holder} is writing there, so no {what} can be written. {remedy}"
        ) from error
    except OSError as error:
        raise KitsegError(format_error(path.parent, error)) from error
    if watch.owner and watch.ended:
        print_plain(f"{path.parent}: taken over from {watch.holder}, which has ended")
    try:
        yield
    finally:
        lock.release()


class _Watch:
    """Watches a lock file until it is free; an owner that refreshes it meanwhile is alive."""

    def __init__(self, lock: SoftFileLease, path: Path, wait: float) -> None:
        self.lock, self.path, self.patience = lock, path, time.monotonic() + wait
        self.reported, self.ended = False, True
        self._begin()

    @property
    def holder(self) -> str:
        """The process that held it when the watch began."""
        return f"process {self.owner.pid} on {self.owner.hostname}" if self.owner else "another process"

    def acquire(self) -> None:
        """Get the lock, or Timeout if its owner lives; afterwards ``ended`` is whether the owner had died."""
        try:
            self.lock.acquire(timeout=FOREVER, poll_interval=0.1, cancel_check=self._decided)
        except Timeout:
            if self._silence() < LEASE:
                raise
            self.lock.break_lock()  # empty since a power cut, or on a network disk that can't exchange files
            self.lock.acquire(blocking=False)
        self.ended = self.ended or self._silence() >= LEASE

    def _begin(self) -> None:
        self.owner, self.seen, self.since = self.lock.owner, _changed(self.path), time.monotonic()

    def _silence(self) -> float:
        return time.monotonic() - self.since

    def _decided(self) -> bool:
        """Whether its owner lives, or is silent for longer than the lock itself needs to be taken over."""
        self.ended = False  # a dead process's lock is taken at once
        changed, owner = _changed(self.path), self.lock.owner
        if changed == self.seen:
            return self._silence() > LEASE + HEARTBEAT
        if owner is None or owner != self.owner:  # released, or another process has it now
            self._begin()
            return False
        self.seen, self.since = changed, time.monotonic()
        if self.since > self.patience:
            return True
        if not self.reported:
            print_plain(f"{self.path.parent}: {self.holder} is writing there; this waits until it has finished")
        self.reported = True
        return False


def _changed(path: Path) -> int | None:
    """When a file was changed, in nanoseconds; None where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _give_way(loss: LeaseCompromise) -> None:
    """End this process if it lost the lock, as after it was suspended; report a lock that can't be refreshed."""
    if loss.reason == "refresh-failed":
        return print_plain(f"{loss.lock_file} can't be refreshed ({loss.error}): let no other command write there")
    ask_to_end()
    print_plain(f"{loss.lock_file} is gone or taken over: another process may write there, so this one ends")
