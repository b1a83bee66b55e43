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
    """Who works on the cases: ``jobs`` processes here or a cluster; with a shard, on a part of them."""

    jobs: int
    cluster: str | None = None
    shard: str | None = None


def gather(title: str, works: Sequence[Work[R]], kept: ResultCache[R] | None, execution: ExecutionOptions) -> list[R]:
    """The results of all cases, with a bar; failures are said. Ends the command where the output isn't its to write.

    Raises:
        UsageError: a part without an output, where the parts could meet.
    """
    from kitseg.runtime.dask import on_cluster
    from kitseg.runtime.resume import results
    from kitseg.runtime.sharding import Share

    share, failed = Share.asked(execution.shard), []
    if share.of > 1 and kept is None:
        raise UsageError("the parts of the work meet in a file: name it with --json or --csv")
    with on_cluster(execution.cluster), console.bar(title, len(share.take(works))) as step:

        def done(result: R) -> None:
            step()
            if result.error:
                failed.append(result.case)
                console.print_error(result.error)

        found = results(works, kept, share, execution.jobs, done)
    if found is None:
        raise typer.Exit(int(bool(failed)))
    return found
