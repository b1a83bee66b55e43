"""Cases shared by several processes on this machine: one a GPU, or several on the CPU, which share its threads.

PyTorch's numbers don't depend on how many threads it has. OpenVINO's do, by 2e-5: bit for bit the same files come from
the same number of threads in each process, which OMP_NUM_THREADS sets.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from kitseg.errors import KitsegError
from kitseg.runtime.console import accept_any_encoding
from kitseg.runtime.files import total_bytes
from kitseg.runtime.outcomes import OnDone, Outcome
from kitseg.runtime.sharding import Share
from kitseg.runtime.signals import blocked, handle, raise_again
from kitseg.types import Case

Log = Callable[[str], None]
#: A verb's work on the cases of a share; it reports what it begins with, and each case's outcome.
Verb = Callable[[Sequence[Case], Share, Log, OnDone], list[Outcome]]
SOCKET_FOLDER = 107 - len("/pymp-12345678/listener-12345678")  # bytes of a folder for temporary files
PATIENCE = 2.0  # seconds that ranks have to end in order


@dataclass(frozen=True)
class _Rank:
    """A process, the connection on which it reports, and its cases."""

    process: SpawnProcess
    receiver: Connection
    cases: Sequence[Case]

    def lost(self, done: Sequence[Outcome]) -> list[Outcome]:
        """Its cases that nothing is known of when it has ended."""
        self.process.join()
        code = self.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        remedy = "Run the same command again to resume; where memory was short, with fewer processes."
        known = {outcome.case for outcome in done}
        return [
            Outcome(case.id, error=f"{case.id}: not done, its process {how}. {remedy}")
            for case in self.cases
            if case.id not in known
        ]


def shorten_socket_paths() -> None:
    """Where TMPDIR is too long for the path of a socket, processes from now on have their sockets elsewhere.

    Otherwise loader processes wait for each other forever.
    """
    if len(os.fsencode(tempfile.gettempdir())) > SOCKET_FOLDER:
        for name in ("TMPDIR", "TEMP", "TMP"):
            os.environ.pop(name, None)
        tempfile.tempdir = None  # found again when it is asked for


def deal(cases: Sequence[Case], share: Share) -> list[Case]:
    """The cases of a share, where there are several the largest scan first."""
    return share.take(cases, lambda case: total_bytes(case.slices or (case.image,)))


def on_ranks(work: Verb, cases: Sequence[Case], shares: Sequence[Share], log: Log, on_done: OnDone) -> list[Outcome]:
    """Have the work on these cases done by a process for each of the shares; ``work`` can be pickled.

    Where one is killed the others continue, and its cases without an outcome have failed.

    Raises:
        KitsegError: what a process could not begin with; the others end, too.
    """
    outcomes: list[Outcome] = []
    with _started(work, cases, shares) as ranks:
        running = {rank.receiver: rank for rank in ranks}
        while running:
            for receiver in wait(list(running)):
                for message in _messages(running, receiver, outcomes):  # type: ignore[arg-type]
                    if isinstance(message, KitsegError):
                        raise message
                    if isinstance(message, str):
                        log(message)
                    else:
                        outcomes.append(message)
                        on_done(message)
    return outcomes


def _messages(running: dict[Connection, _Rank], receiver: Connection, done: Sequence[Outcome]) -> list[Any]:
    """What a rank reports; where it has ended, the outcomes of the rest of its cases."""
    try:
        return [receiver.recv()]
    except (EOFError, OSError):
        return list(running.pop(receiver).lost(done))


@contextmanager
def _started(work: Verb, cases: Sequence[Case], shares: Sequence[Share]) -> Iterator[list[_Rank]]:
    """The processes; none is left when the block ends."""
    context, ranks = get_context("spawn"), []
    try:
        for number, share in enumerate(shares):
            receiver, sender = context.Pipe(duplex=False)
            mine = deal(cases, Share(number, len(shares)))
            arguments = (work, mine, share, (number, len(shares)), sender)
            process = context.Process(target=_run, args=arguments, daemon=True)
            with blocked(signal.SIGINT):  # on Windows `_run` ignores it
                process.start()
            sender.close()
            ranks.append(_Rank(process, receiver, mine))
        yield ranks
    finally:
        end = time.monotonic() + PATIENCE
        for rank in ranks:
            rank.process.terminate()
        for rank in ranks:
            rank.process.join(max(0, end - time.monotonic()))
            rank.process.kill()
            rank.process.join()


def _run(work: Verb, cases: Sequence[Case], share: Share, rank: tuple[int, int], sender: Connection) -> None:
    """Do a rank's part of the work, as long as the process that started it lives."""
    signal.signal(signal.SIGTERM, handle)
    if not hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    number, of = rank
    accept_any_encoding()
    os.environ["LOCAL_RANK"] = str(number)
    try:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // of))
        work(cases, share, sender.send if number == 0 else lambda _: None, sender.send)
    except KitsegError as error:
        sender.send(error)
    except Exception:
        raise_again()
        raise


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        wait([parent.sentinel])
        os._exit(1)
