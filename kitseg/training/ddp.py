"""The processes of one training keep together: the first says what is trained next, the others follow.

Only the first looks at what is on disk, so that they need not agree about it. Each fit takes place in processes of its
own, because a process can open Lightning's process group once.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from lightning_fabric.plugins.environments.lightning import find_free_network_port
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from kitseg.errors import KitsegError, UsageError
from kitseg.runtime.launcher import Launch
from kitseg.training.signals import call

PAUSE, FAREWELL = 0.1, 8.0  # seconds: between two looks; for the others to hear the last word
ARRIVAL = 600.0  # seconds within which all processes must have come
FAILED, CAME, GONE = "failed", "came", "gone"


class RankCoordinator:
    """The processes of a launch, as a context: where one of them fails, none is left waiting.

    Raises:
        UsageError: they don't find each other.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch, self.calls = launch, 0
        self.board = _board(launch)
        self.board.add(CAME, 1)

    def __enter__(self) -> RankCoordinator:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with suppress(RuntimeError):  # the first may be gone, and the board with it
            if error is not None:
                self.board.set(FAILED, str(error))
            elif self.leads:
                self._say([])
            if self.board.add(GONE, 1) < self.launch.of and self.leads:
                self._wait_for(GONE, FAREWELL)

    @property
    def leads(self) -> bool:
        """Whether this is the process that decides."""
        return self.launch.index == 0

    def train(self, arguments: Sequence[str]) -> None:
        """`kitseg train ARGUMENTS` on all ranks, those of the other processes too. For the first process.

        Raises:
            KitsegError: a rank has failed. UsageError: not all processes have come.
        """
        if not self._wait_for(CAME, ARRIVAL):
            raise UsageError(
                f"{self.board.add(CAME, 0)} of {self.launch.of} processes have come to {self.launch.address}:"
                f"{self.launch.port}: start kitseg on every node, or leave --nodes away"
            )
        port = find_free_network_port()
        self._say([str(port), *arguments])
        self._run(port, arguments)

    def follow(self) -> None:
        """Run what the first process calls for, until it is done. For the others.

        Raises:
            KitsegError: a rank has failed.
        """
        while words := self._heard():
            port, *arguments = words
            self._run(int(port), arguments)

    def _say(self, words: Sequence[str]) -> None:
        self.board.set(f"call {self.calls}", json.dumps(words))
        self.calls += 1

    def _heard(self) -> list[str]:
        while not self.board.check([f"call {self.calls}"]):
            time.sleep(PAUSE)
            self._check()
        words: list[str] = json.loads(self.board.get(f"call {self.calls}"))
        self.calls += 1
        return words

    def _run(self, port: int, arguments: Sequence[str]) -> None:
        command = [sys.executable, "-m", "kitseg", "train", *arguments]
        code = call(command, self.launch.environment(port), self._check)
        if code:
            what = arguments[-1].removeprefix("--only=")
            raise KitsegError(f"{what}: a rank ended with exit code {code}; its own message stands above")

    def _check(self) -> None:
        try:
            failed = self.board.check([FAILED])
        except RuntimeError as error:
            raise KitsegError("the training's first process has ended; its own message says why") from error
        if failed:
            raise KitsegError("another process of the training has failed; its own message says why")

    def _wait_for(self, event: str, seconds: float) -> bool:
        """Whether it has happened to all processes within this time."""
        end = time.monotonic() + seconds
        while int(self.board.add(event, 0)) < self.launch.of:
            if time.monotonic() > end:
                return False
            time.sleep(PAUSE)
        return True


def end_with_starter() -> None:
    """End this process, whatever it does, when the one that started it and holds the end of its stdin is gone."""

    def watch() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _board(launch: Launch) -> Store:
    """What all processes read and write."""
    if launch.of == 1:
        return HashStore()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(
            launch.address,
            launch.port,
            is_master=launch.index == 0 and not launch.agent,
            timeout=timedelta(seconds=ARRIVAL),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        place, reason = f"{launch.address}:{launch.port}", str(error).splitlines()[0]
        raise UsageError(
            f"the training's processes can't meet at {place} ({reason}): set MASTER_ADDR to an address of machine 0 "
            "that all can reach, and MASTER_PORT to a free port there"
        ) from error
    return PrefixStore(f"kitseg {attempt}", store)
