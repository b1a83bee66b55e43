"""Shared by commands that gather results over cases into one output: local processes, dask clusters and shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import typer

from kitseg.cli.app import take_share
from kitseg.errors import UsageError
from kitseg.runtime import console

if TYPE_CHECKING:
    from kitseg.runtime.resume import Result, ResultCache, Task

R = TypeVar("R", bound="Result")


def gather(
    title: str,
    tasks: Sequence[Task],
    work: partial[R] | ResultCache[R],
    jobs: int,
    cluster: str | None,
    shard: str | None,
) -> list[R]:
    """The results of all tasks, with a bar and a line for each error; exits if another part has the output."""
    from joblib import delayed

    from kitseg.runtime.dask import on_cluster
    from kitseg.runtime.outcomes import in_parallel

    share = take_share(shard)
    cache = None if isinstance(work, partial) else work
    if share.of > 1 and cache is None:
        raise UsageError("the parts of the work meet in a file: name it with --json or --csv")
    mine, do = share.take(tasks), delayed(work if isinstance(work, partial) else work.do)
    with on_cluster(cluster), console.bar(title, len(mine)) as step:

        def done(result: R) -> None:
            step()
            if result.error:
                console.print_error(result.error)

        found: list[R] = in_parallel(map(do, mine), jobs if len(mine) > 1 else 1, done)
    joined = cache.join_parts(tasks, share, found) if cache and share.of > 1 else found
    if joined is None:
        raise typer.Exit(int(any(result.error for result in found)))
    return joined
