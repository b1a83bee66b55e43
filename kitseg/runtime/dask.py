"""Case-parallel work on many machines: joblib's tasks on the workers of a dask cluster.

The workers read and write the files themselves, so every machine must see the same folders under the same paths.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from joblib import parallel_config
from joblib.parallel import ParallelBackendBase

from kitseg.errors import KitsegError, UsageError

if TYPE_CHECKING:
    from distributed import Client, Future

PATIENCE = 5.0  # seconds for the scheduler to answer, and for a first worker
ALONE = 60.0  # seconds without any worker after which the work is given up
LOOK = 2.0  # seconds between two looks at the workers


class ClusterBackend(ParallelBackendBase):  # type: ignore[misc]  # joblib ships no types
    """A joblib backend that hands tasks to dask, as many at a time as its workers have threads.

    joblib's own dask backend waits for ever for a task whose worker was killed.
    """

    supports_retrieve_callback = True

    def __init__(self, client: Client, nesting_level: int | None = None) -> None:
        super().__init__(nesting_level)
        self.client, self.pending = client, set[Any]()
        self.over = Event()
        self.problem = "the dask cluster was shut down"

    def effective_n_jobs(self, n_jobs: int) -> int:
        """Tasks at a time; two at least, since joblib does the work of a single one itself."""
        return max(int(sum(self.client.nthreads().values())), 2)

    def submit(self, func: Any, callback: Any = None) -> Future[Any]:
        """Hand over a task; the callback hears of its end, however it ends."""
        future = self.client.submit(func, pure=False)
        self.pending.add(future)
        future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """What a task returned, or raise what it raised.

        Raises:
            KitsegError: its workers were killed, or the cluster is gone.
        """
        from distributed import KilledWorker

        self.pending.discard(out)
        try:
            return out.result()
        except KilledWorker as error:
            remedy = "Its machine may be short of memory: start workers with fewer threads, then call again."
            raise KitsegError(f"a dask worker was killed, again and again, by the same case. {remedy}") from error
        except CancelledError as error:
            raise KitsegError(f"{self.problem}: what is done stays done. Start it, then call again.") from error

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Take back what no worker has begun."""
        self.client.cancel(list(self.pending))
        self.pending.clear()

    def watch(self) -> None:
        """Give the work up when there have been no workers for ``ALONE`` seconds."""
        alone = 0.0
        while alone < ALONE and not self.over.wait(LOOK):
            alone = 0.0 if self.client.nthreads() else alone + LOOK
        if not self.over.is_set():
            self.problem = f"the dask cluster has had no workers for {ALONE:.0f} s"
            self.abort_everything()


@contextmanager
def on_cluster(address: str | None) -> Iterator[None]:
    """Have the case-parallel work of a block done by a dask cluster, ``dask://host:port``; on this machine for None.

    Raises:
        UsageError: that is no such address.
        KitsegError: dask isn't installed, no scheduler answers, or there are no workers or ones with another kitseg.
    """
    if address is None:
        yield
        return
    client = _connect(address)
    backend = ClusterBackend(client)
    try:
        _check_versions(client, address)
        Thread(target=backend.watch, daemon=True).start()
        with parallel_config(backend=backend):
            yield
    finally:
        backend.over.set()
        client.close(timeout=PATIENCE)


def _connect(address: str) -> Client:
    if not re.fullmatch(r"dask://[^/\s]+:\d+", address):
        raise UsageError(f"--cluster {address}: it takes the address of a dask scheduler, dask://host:port")
    try:
        from distributed import Client
    except ImportError as error:
        remedy = "Install kitseg with it: pip install -c constraints.txt '.[cluster]'"
        raise KitsegError(f"--cluster {address}: dask is not installed. {remedy}") from error
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what befalls is said in one line
    try:
        return Client(address.replace("dask", "tcp", 1), timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        remedy = "Start it with `dask scheduler`, and check host and port."
        raise KitsegError(f"{address}: no dask scheduler answers. {remedy}") from error


def _check_versions(client: Client, address: str) -> None:
    """Whether there are workers, and everybody has this version of kitseg."""
    with suppress(TimeoutError):
        client.wait_for_workers(1, timeout=PATIENCE)
    workers = client.run(version, "kitseg", on_error="return")
    if not workers:
        raise KitsegError(f"{address}: it has no workers. Start some: dask worker HOST:PORT --nthreads 1")
    own, found = version("kitseg"), {f"worker {name}": theirs for name, theirs in workers.items()}
    try:
        found["its scheduler"] = client.run_on_scheduler(version, "kitseg")
    except PackageNotFoundError as error:
        found["its scheduler"] = error
    for who, theirs in found.items():
        if theirs != own:
            there = f"kitseg {theirs}" if isinstance(theirs, str) else "no kitseg"
            raise KitsegError(f"{address}: {who} has {there}, not {own}. Install the same on every machine.")
