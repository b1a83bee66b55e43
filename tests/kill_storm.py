"""A storm of SIGKILLs: a verb is killed at random moments and called again, and must end as if nothing had happened.

It runs once undisturbed and then in storms until that many kills have struck (the whole process group each time, at
moments drawn from the undisturbed run's duration); what both have left is compared byte by byte, of checkpoints the
weights, of JSON all but times, paths and hashes (the files are compared themselves).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

VOLATILE = {"seconds", "mtime", "sha256", "path"}
PASSING = ("tensorboard", "curves.png")  # a log, and a picture that is drawn now and then
TEMPORARY = (".partial*", ".kitseg*.lock", "previous.ckpt")


def storm(
    verb: str, command: tuple[str, ...], start: Path, work: Path, kills: int, draw: random.Random
) -> tuple[int, list[str]]:
    """Let one verb run undisturbed and in storms, each from a copy of ``start``; ``work/verb/whole`` is the former.

    Returns:
        How many kills struck, and what differs or was left behind.
    """
    whole = copy(start, work / verb / "whole")
    lasts, idle = timed(command, whole), timed(command, whole)
    struck = calls = 0
    wrong: list[str] = []
    while struck < kills:
        folder = copy(start, work / verb / f"storm-{calls}")
        done = False
        while not done:
            calls += 1
            moment = draw.uniform(0, idle + 2 * lasts / kills) if struck < kills else None
            done = call(command, folder, moment)
            struck += not done
        wrong += [*differences(whole, folder), *(f"{path} is left" for path in leftovers(folder))]
    return struck, wrong


def call(command: tuple[str, ...], folder: Path, moment: float | None) -> bool:
    """Whether the command came to its end, before its whole process group was killed after so many seconds."""
    with (folder.parent / "log.txt").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kitseg", *command], cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
    if code:
        raise SystemExit(f"kitseg {' '.join(command)} ended with {code}: see {folder.parent / 'log.txt'}")
    return True


def timed(command: tuple[str, ...], folder: Path) -> float:
    """Seconds that the command takes."""
    begun = time.monotonic()
    call(command, folder, None)
    return time.monotonic() - begun


def copy(source: Path, target: Path) -> Path:
    """A copy of a working folder."""
    return shutil.copytree(source, target, symlinks=True)


def leftovers(folder: Path) -> list[Path]:
    """Temporary files that nobody removed."""
    return [path.relative_to(folder) for pattern in TEMPORARY for path in folder.rglob(pattern)]


def differences(one: Path, other: Path) -> list[str]:
    """What two working folders differ in, but for logs and times."""
    here, there = dict(contents(one)), dict(contents(other))
    missing = [f"{name} is in one only" for name in sorted(here.keys() ^ there.keys())]
    return missing + [f"{name} differs" for name in sorted(here.keys() & there.keys()) if here[name] != there[name]]


def contents(folder: Path) -> Iterator[tuple[str, Any]]:
    """The name of each file with what must not differ in it."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not set(name.parts) & set(PASSING) and name.parts[0] not in ("data", "test"):
            yield str(name), essence(path)


def essence(path: Path) -> Any:
    """What of a file must be the same in two runs."""
    if path.suffix == ".ckpt":
        state = torch.load(path, weights_only=True)["state_dict"]
        return {name: weight.numpy().tobytes() for name, weight in state.items()}
    return steady(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def steady(content: Any) -> Any:
    """JSON without what changes from run to run."""
    if isinstance(content, dict):
        return {key: steady(value) for key, value in content.items() if key not in VOLATILE}
    return [steady(value) for value in content] if isinstance(content, list) else content
