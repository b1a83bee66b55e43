"""Shared by commands that gather results over cases into one output: local processes, dask clusters and shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kitseg.errors import UsageError
from kitseg.runtime import console

if TYPE_CHECKING:
    from kitseg.runtime.resume import Result, ResultCache, Work

R = TypeVar("R", bound="Result")
Cluster = Annotated[
    str | None,
    typer.Option(metavar="dask://HOST:PORT", help="Process the cases on the workers of a dask cluster."),
]


@dataclass(frozen=True)
class ExecutionOptions:
    """Where cases are worked on: in ``jobs`` processes here or on a cluster; with a shard, only a part of them."""

    jobs: int
    cluster: str | None = None
    shard: str | None = None


def gather(title: str, works: Sequence[Work[R]], cache: ResultCache[R] | None, execution: ExecutionOptions) -> list[R]:
    """The results of all cases, with a bar and a line for each error; ends the command if another part has the output.

    Raises:
        UsageError: a part without an output, where the parts could be joined.
    """
    from kitseg.runtime.dask import on_cluster
    from kitseg.runtime.outcomes import in_parallel
    from kitseg.runtime.resume import join_parts, tasks
    from kitseg.runtime.sharding import Share

    share = Share.asked(execution.shard)
    if share.of > 1 and cache is None:
        raise UsageError("the parts of the work meet in a file: name it with --json or --csv")
    mine = share.take(works)
    with on_cluster(execution.cluster), console.bar(title, len(mine)) as step:

        def done(result: R) -> None:
            step()
            if result.error:
                console.print_error(result.error)

        found: list[R] = in_parallel(tasks(mine, cache), execution.jobs if len(mine) > 1 else 1, done)
    joined = join_parts(works, cache, share, found) if cache and share.of > 1 else found
    if joined is None:
        raise typer.Exit(int(any(result.error for result in found)))
    return joined
