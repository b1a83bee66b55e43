"""One side of a row as a process: how long it took, its processor time, and the peak memory of its whole tree."""

from __future__ import annotations

import json
import resource
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

INTERVAL = 0.2  # seconds between looks at the memory


@dataclass(frozen=True)
class Measured:
    """value: what the script says, or the seconds of the whole process; gb: peak of the tree; cpu: seconds."""

    value: float
    gb: float
    cpu: float
    more: Mapping[str, Any] = field(default_factory=dict)


def measure(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Measured:
    """Run a command and measure it; its output goes to ``log``.

    Raises:
        SystemExit: it failed.
    """
    before = _children_seconds()
    begun, seen, ended = time.perf_counter(), [0], threading.Event()
    with log.open("w") as output:
        process = subprocess.Popen(command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT)
        watcher = threading.Thread(target=_watch, args=(psutil.Process(process.pid), seen, ended))
        watcher.start()
        process.wait()
        seconds = time.perf_counter() - begun
        ended.set()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    said = _last_object(log.read_text())
    value = float(said.pop("value", seconds))
    return Measured(value, max(seen) / 1e9, _children_seconds() - before, said)


def _watch(process: psutil.Process, seen: list[int], ended: threading.Event) -> None:
    """Look at the memory until the process has ended: at once, soon, and then every ``INTERVAL``."""
    pause = INTERVAL / 16
    while not ended.wait(pause):
        seen.append(_tree_bytes(process))
        pause = min(2 * pause, INTERVAL)


def _tree_bytes(process: psutil.Process) -> int:
    """Memory of a process and all below it; of several, what they share counts once (PSS).

    PSS walks all pages, which costs the process some percent of its time, so one by itself is asked for its RSS.
    """
    total = 0
    try:
        below = process.children(recursive=True)
        if not below:
            return int(process.memory_info().rss)
        for one in (process, *below):
            total += one.memory_full_info().pss
    except psutil.Error:  # one has just ended
        pass
    return total


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _last_object(text: str) -> dict[str, Any]:
    """The JSON object in the last line, empty where there is none."""
    lines = text.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
