"""Training on several ranks: every process runs the same command, and loops over the same trainings.

Only the first process reads the disk and decides what is trained next; the others receive each training through a
TCPStore, and wait there without using a GPU. PyTorch's process group is opened once, with the first training. If one
process fails, a thread in each of the others ends that process, since a collective operation would wait for hours.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from kitseg.errors import KitsegError, UsageError
from kitseg.runtime.launcher import Launch
from kitseg.runtime.signals import PATIENCE, Stopped, ask_to_end, end_now

T = TypeVar("T")
PAUSE, MOMENT, PARTING = 0.1, 1.0, 8.0  # seconds: between two looks; to end; for others to read the last message
ARRIVAL = timedelta(minutes=10)  # within which all processes must have connected
COLLECTIVE = timedelta(hours=6)  # ranks validate cases of different sizes
FAILED, CAME, GONE = "failed", "came", "gone"


class RankCoordinator:
    """A context manager for the processes of a training: if one of them fails, all end.

    Args:
        launch: identifies this process. backend: of PyTorch's process group.
        arguments: of kitseg, for the processes that this one starts.

    Raises:
        UsageError: the processes can't connect. KitsegError: another process has failed.
    """

    def __init__(self, launch: Launch, backend: str, arguments: Sequence[str]) -> None:
        self.launch, self.backend, self.arguments = launch, backend, arguments
        self.children: list[subprocess.Popen[bytes]] = []
        self.number = 0  # of the signal that has ended another process
        self.over, self.failed = threading.Event(), threading.Event()
        self.problem = "it was killed, or can no longer be reached"
        if launch.of > 1:
            self.place, self.store = _open_store(launch)
            self.parent = os.getppid() if launch.local else None
            threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> RankCoordinator:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.launch.of == 1:
            return
        lost = isinstance(error, RuntimeError) and (self.failed.wait(PATIENCE) or _is_broken(error))
        self.over.set()
        with suppress(RuntimeError, KitsegError):  # the first process may be gone, and the store with it
            if error is not None and not self.failed.is_set():
                self.store.set(FAILED, _as_message(self.launch.index, error))
            self.store.add(GONE, 1)
            if self.launch.index == 0:
                self._wait_for(GONE, PARTING)
        self._end_children()
        if error is None and dist.is_initialized():
            dist.destroy_process_group()
        if lost:
            raise self._failure() from None

    def share(
        self,
        trainings: Callable[[], Iterable[T]],
        encode: Callable[[T], Any] = lambda training: training,
        decode: Callable[[Any], T] = lambda message: message,
    ) -> Generator[T, None, None]:
        """The first process's trainings, in every process; only the first calls ``trainings``.

        encode, decode: a training as plain values, which the others receive as JSON, and back.
        """
        if self.launch.of == 1:
            yield from trainings()
        elif self.launch.index == 0:
            for number, training in enumerate(trainings()):
                self.store.set(f"training {number}", json.dumps(encode(training)))
                self._join()
                yield training
            self.store.set("last", "")
        else:
            number = 0
            while (message := self._receive(number)) is not None:
                self._join()
                yield decode(message)
                number += 1

    def _receive(self, number: int) -> Any:
        """The training of this number; None after the last."""
        while not self.store.check([f"training {number}"]):
            if self.store.check(["last"]):
                return None
            if self.failed.wait(PAUSE):
                raise self._failure()
        return json.loads(self.store.get(f"training {number}"))

    def _join(self) -> None:
        """Start the other processes of this machine, and open the process group; once."""
        if dist.is_initialized():
            return
        if not self.launch.started:
            command = [sys.executable, "-m", "kitseg", *self.arguments]
            for local in range(1, self.launch.per_node):
                environment = self.launch.environment(local, self.place)
                self.children.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
        self.store.add(CAME, 1)
        if not self._wait_for(CAME, ARRIVAL.total_seconds()):
            raise UsageError(
                f"only {self.store.add(CAME, 0)} of {self.launch.of} processes connected to {self.launch.address}:"
                f"{self.place}. Start kitseg on every node, or omit --nodes"
            )
        store = PrefixStore("group", self.store)
        dist.init_process_group(
            self.backend, store=store, rank=self.launch.index, world_size=self.launch.of, timeout=COLLECTIVE
        )

    def _wait_for(self, event: str, seconds: float) -> bool:
        """Whether all processes have reached this point within the time."""
        end = time.monotonic() + seconds
        while int(self.store.add(event, 0)) < self.launch.of:
            if time.monotonic() > end:
                return False
            if self.failed.wait(PAUSE):
                raise self._failure()
        return True

    def _failure(self) -> BaseException:
        """The error of this process after another has failed; one line for all ranks of a machine."""
        if self.number:
            return Stopped(128 + self.number)
        if self.launch.local:
            return SystemExit(1)
        return KitsegError(f"another process of the training has ended: {self.problem}")

    def _end_children(self) -> None:
        end = time.monotonic() + PATIENCE
        for child in self.children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0, end - time.monotonic()))
            child.kill()
            child.wait()

    def _watch(self) -> None:
        """End this process after another has ended, unless it ends by itself with its own error."""
        store = _connect(self.launch, self.place, is_master=False)
        while not self.over.wait(PAUSE):
            content = self._look(store)
            if content is None:
                continue
            self.problem, self.number = content["problem"], content["signal"]
            self.failed.set()
            if self.number and not self.over.wait(MOMENT):  # after a training step, all ranks end by themselves
                ask_to_end(self.number)
            if not self.over.wait(PATIENCE):  # an operation of all ranks waits for the one that is gone
                end_now(128 + self.number if self.number else 1, None if self.number else str(self._failure()))
            return

    def _look(self, store: Store) -> dict[str, Any] | None:
        """The error of another process, if one has failed."""
        problem = ""
        for local, child in enumerate(self.children, start=1):
            if child.poll():
                how = f"was killed by {signal.Signals(-child.returncode).name}" if child.returncode < 0 else "failed"
                problem = f"rank {local} of machine {self.launch.node} {how}"
        if self.parent is not None and os.getppid() != self.parent:
            problem = "the process that started this one has ended"
        try:
            if store.check([FAILED]):
                found: dict[str, Any] = json.loads(store.get(FAILED))
                return found
            if problem:
                store.set(FAILED, json.dumps({"problem": problem, "signal": 0}))
        except RuntimeError:
            problem = problem or "the first process has ended; see its own error"
        return {"problem": problem, "signal": 0} if problem else None


def _is_broken(error: RuntimeError) -> bool:
    """Whether the error is a lost connection to another rank; gloo has no error type for it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _as_message(index: int, error: BaseException) -> str:
    number = error.code - 128 if isinstance(error, Stopped) else 0
    text = str(error) if isinstance(error, KitsegError) else f"{type(error).__name__}: {error}"
    return json.dumps({"problem": f"rank {index}: {text}", "signal": number})


def _open_store(launch: Launch) -> tuple[int, Store]:
    """The store shared by all processes, and its port."""
    try:
        store = _connect(launch, launch.port, is_master=launch.index == 0 and not launch.agent)
    except RuntimeError as error:
        place, reason = f"{launch.address}:{launch.port}", str(error).splitlines()[0]
        raise UsageError(
            f"the training's processes can't connect to {place} ({reason}). Set MASTER_ADDR to an address of machine 0 "
            "that all machines can reach, and MASTER_PORT to a free port on it"
        ) from error
    port: int = store.underlying_store.port  # type: ignore[attr-defined]
    return port, store


def _connect(launch: Launch, port: int, is_master: bool) -> Store:
    """A separate connection, because a waiting connection blocks other threads."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = TCPStore(launch.address, port, is_master=is_master, timeout=ARRIVAL, wait_for_workers=False)
    return PrefixStore(f"kitseg {attempt}", store)
