"""A storm of SIGKILLs: each verb is killed at random moments and called again, and must end as if nothing had happened.

    python tests/kill_storm.py --kills 20 --method two-phase --verbs preprocess train infer predict

Makes phantoms, runs each verb once undisturbed and then in storms until that many kills have struck (the whole process
group each time, at moments drawn from the undisturbed run's duration), and compares what both have left, byte by byte;
of checkpoints the weights, of JSON all but times, paths and hashes (the files are compared themselves).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from method_runs import smaller

#: Trainings of two small stages with dropout, that save after every batch.
TRAIN = (
    "--size=tiny", "--epochs=4", "--save-every=0", "--jobs=1", "--device=cpu", "--set=stages.*.validate_every=2",
    "--set=keep_best=2",
)  # fmt: skip
MORE = {
    "two-phase": ("--set=size.inplane_factor=8", "--set=size.dropout=0.3", "--set=size.fine_samples=4"),
    "progressive": ("--set=size.round_epochs=2",),
}
VOLATILE = {"seconds", "mtime", "sha256", "path"}
PASSING = ("tensorboard", "curves.png")  # a log, and a picture that is drawn now and then
TEMPORARY = (".partial*", ".kitseg*.lock", "previous.ckpt")


@dataclass(frozen=True)
class Storm:
    """What came of one verb: kills that struck, calls, and what differs or was left behind."""

    verb: str
    kills: int
    calls: int
    seconds: float
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        state = "identical" if not self.wrong else "; ".join(self.wrong[:5])
        return f"{self.verb}: {self.kills} kills in {self.calls} calls, {self.seconds:.0f} s undisturbed: {state}"


def commands(method: str, options: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The command line of each verb, and of ``train`` before those that need a run."""
    run = f"runs/{method}-tiny"
    only = tuple(option for option in options if not option.startswith(("--epochs", "--save-every", "--device")))
    return {
        "preprocess": ("preprocess", f"--method={method}", *only),
        "train": ("train", f"--method={method}", *options),
        "infer": ("infer", f"--run={run}", "--data=test", "--device=cpu", "--output=probabilities"),
        "predict": ("predict", "test", f"--model={run}", "--device=cpu", "--output=predictions"),
    }


def storm(verb: str, command: tuple[str, ...], start: Path, work: Path, kills: int, draw: random.Random) -> Storm:
    """Let one verb run undisturbed and in storms, each from a copy of ``start``; ``work/verb/whole`` is the former."""
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
    return Storm(verb, struck, calls, lasts, tuple(wrong))


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


def main() -> None:
    """Storms over the verbs asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--method", default="two-phase")
    parser.add_argument("--verbs", nargs="+", default=["preprocess", "train", "infer", "predict"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("kill-storm"), help="A new folder; stays.")
    given = parser.parse_args()
    bare = given.work / "bare"
    bare.mkdir(parents=True)
    for name, cases in (("data", 6), ("test", 3)):
        call(("phantom", name, f"--cases={cases}", f"--seed={cases}", "--matrix=64", "--jobs=1"), bare, None)
    orders = commands(given.method, (*TRAIN, *smaller(given.method), *MORE.get(given.method, ())))
    trained = bare
    if {"infer", "predict"} & set(given.verbs):
        trained = copy(bare, given.work / "trained")
        call(orders["train"], trained, None)
    failed = False
    for verb in given.verbs:
        start = bare if verb in ("preprocess", "train") else trained
        found = storm(verb, orders[verb], start, given.work, given.kills, random.Random(f"{given.seed} {verb}"))
        print(found, flush=True)
        failed |= bool(found.wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
