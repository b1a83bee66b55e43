"""Case-parallel work on many machines: joblib's delayed tasks on the workers of a dask cluster.

The workers read and write the files themselves, so every machine must see the same folders under the same paths.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from kitseg.errors import KitsegError, UsageError, require_extra

if TYPE_CHECKING:
    from distributed import Client, Future

PATIENCE = 5.0  # seconds for the scheduler to answer, and for a first worker
ALONE = 60.0  # seconds without any worker after which the work is given up
POLL = 0.1  # seconds between two looks at the tasks and the workers
_RESTART = "what is done stays done. Start it, then call again."

_client: ContextVar[Client | None] = ContextVar("client", default=None)


def connected() -> Client | None:
    """The cluster of ``on_cluster``'s block; None outside of one."""
    return _client.get()


@contextmanager
def on_cluster(address: str | None) -> Iterator[None]:
    """Have the parallel work of a block done by a dask cluster, ``dask://host:port``; on this machine for None."""
    if address is None:
        yield
        return
    client = _connect(address)
    token = _client.set(client)
    try:
        _check_versions(client, address)
        yield
    finally:
        _client.reset(token)
        client.close(timeout=PATIENCE)


def cluster_results(client: Client, tasks: Iterable[Any], ordered: bool) -> Iterator[Any]:
    """The results of joblib's delayed tasks, in their order or as they are done; KitsegError if the cluster fails."""
    waiting = [client.submit(function, *args, pure=False, **named) for function, args, named in tasks]
    done: dict[Any, Future[Any]] = {}
    try:
        for future in _as_done(client, waiting):
            done[future.key] = future
            while waiting and (key := waiting[0].key if ordered else future.key) in done:
                yield _result(done.pop(key))
                waiting = [other for other in waiting if other.key != key]
    finally:
        with suppress(OSError):
            client.cancel(waiting)


def _as_done(client: Client, futures: Sequence[Future[Any]]) -> Iterator[Future[Any]]:
    """The futures as they end; KitsegError if there has been no worker for ``ALONE`` seconds."""
    from distributed import as_completed

    ended, last_worker = as_completed(futures, loop=client.loop), time.monotonic()
    while not ended.is_empty():
        if ended.has_ready():
            yield next(ended)
        elif _has_workers(client):
            last_worker = time.monotonic()
            time.sleep(POLL)
        elif time.monotonic() - last_worker > ALONE:
            raise KitsegError(f"the dask cluster has had no workers for {ALONE:.0f} s: {_RESTART}")


def _has_workers(client: Client) -> bool:
    try:
        return bool(client.nthreads())
    except OSError as error:
        raise KitsegError(f"the dask cluster was shut down: {_RESTART}") from error


def _result(future: Future[Any]) -> Any:
    """What a task returned, or raise what it raised."""
    from distributed import KilledWorker

    try:
        return future.result()
    except KilledWorker as error:
        remedy = "Its machine may be short of memory: start workers with fewer threads, then call again."
        raise KitsegError(f"a dask worker was killed, again and again, by the same case. {remedy}") from error
    except CancelledError as error:
        raise KitsegError(f"the dask cluster was shut down: {_RESTART}") from error


def _connect(address: str) -> Client:
    if not re.fullmatch(r"dask://[^/\s]+:\d+", address):
        raise UsageError(f"--cluster {address}: it takes the address of a dask scheduler, dask://host:port")
    require_extra("cluster", "distributed")
    from distributed import Client

    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are reported in one line
    try:
        return Client(address.replace("dask", "tcp", 1), timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        remedy = "Start it with `dask scheduler`, and check host and port."
        raise KitsegError(f"{address}: no dask scheduler answers. {remedy}") from error


def _check_versions(client: Client, address: str) -> None:
    """Check that there are workers, and that scheduler and workers have this version of kitseg."""
    with suppress(TimeoutError):
        client.wait_for_workers(1, timeout=PATIENCE)
    workers = client.run(version, "kitseg", on_error="return")
    if not workers:
        raise KitsegError(f"{address}: it has no workers. Start some: dask worker HOST:PORT --nthreads 1")
    found = {f"worker {name}": theirs for name, theirs in workers.items()}
    try:
        found["its scheduler"] = client.run_on_scheduler(version, "kitseg")
    except PackageNotFoundError as error:
        found["its scheduler"] = error
    for name, theirs in found.items():
        if theirs != (own := version("kitseg")):
            there = f"kitseg {theirs}" if isinstance(theirs, str) else "no kitseg"
            raise KitsegError(f"{address}: {name} has {there}, not {own}. Install the same on every machine.")
