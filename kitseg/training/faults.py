"""Failures of the machine in a training, with the settings that help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kitseg.errors import GPU, LOADER, MEMORY, KitsegError, fault

_LESS = "--set stages.STAGE.micro_batch_size=1 (fewer patches at a time, the same batch) or a smaller --size"
#: Remedies by the failure.
SETTINGS = {
    MEMORY: f"Use fewer --workers, {_LESS}, then call again to resume",
    GPU: f"Use {_LESS}",
    LOADER: "The machine may be short of memory: resume with fewer --workers; 0 needs no loader processes",
}


@contextmanager
def in_settings(folder: Path) -> Iterator[None]:
    """Convert a failure of the machine inside the block to an error in one line.

    Raises:
        KitsegError: memory, disk or a loader process failed.
    """
    try:
        yield
    except (OSError, RuntimeError, MemoryError) as error:
        found = fault(error)
        if found is None:
            raise
        raise KitsegError(f"{folder}: {found[0]}. {SETTINGS.get(found, found[1])}.") from error
