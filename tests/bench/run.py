"""Runs the benchmark and writes docs/explanation/benchmarks.md: ``nox -s bench`` or ``nox -s bench -- ROW ...``.

KITSEG_BENCH_CASES: a folder of labelled cases in the KiTS layout to use instead of phantoms. KITSEG_BENCH_RUNS: a
folder of runs named METHOD-CHECKPOINTS, such as two-phase-1, to predict with instead of untrained networks.
KITSEG_BENCH_WORK: where cases and what is made of them lie.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from measure import Measured, measure
from page import machine, read_results, versions, write_page
from rows import ROWS, Row, Side

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Bench:
    """Where the work is done, and the Python of each environment."""

    work: Path
    pythons: Mapping[str, str]

    def run(self, environment: str, *command: str, out: Path | None = None) -> Measured:
        """One command, ``{work}``, ``{runs}`` and ``{out}`` filled in."""
        runs = os.environ.get("KITSEG_BENCH_RUNS", str(self.work / "runs"))
        filled = [part.format(work=self.work, runs=runs, out=out or "") for part in command]
        if filled[0].endswith(".py"):
            filled[0] = str(HERE / "sides" / filled[0])
        folders = {f"nnUNet_{name}": str(self.work / "nnunet" / name) for name in ("raw", "preprocessed", "results")}
        return measure([self.pythons[environment], *filled], {**os.environ, **folders}, self.work / "log.txt")

    def prepare(self, step: str) -> None:
        """Make what a row needs, once."""
        done = self.work / "done" / step.replace(" ", "-")
        if done.exists():
            return
        name, *values = step.split()
        before = {"preprocessed": ["data"], "plan": ["data"], "nnunet": ["plan"], "network": ["preprocessed"]}
        for earlier in before.get(name, []):
            self.prepare(earlier)
        print(f"preparing: {step}", flush=True)
        getattr(self, f"_{name}")(*values)
        done.parent.mkdir(exist_ok=True)
        done.touch()

    def _data(self) -> None:
        given = os.environ.get("KITSEG_BENCH_CASES")
        if given:
            (self.work / "data").symlink_to(Path(given).resolve())
        else:
            self.run("kitseg", "-m", "kitseg", "phantom", "{work}/data", "--cases", "4", "--jobs", "1")

    def _preprocessed(self) -> None:
        to = "{work}/preprocessed"
        self.run("kitseg", "-m", "kitseg", "preprocess", "{work}/data", "--to", to, "--method", "two-phase")

    def _plan(self) -> None:
        self.run("nnunetv2", "prepare_nnunetv2.py", "{work}")

    def _nnunet(self) -> None:
        self.run("nnunetv2", "preprocess_nnunetv2.py")

    def _network(self) -> None:
        self.run("kitseg", "prepare_kitseg.py", "{work}")
        self.run("kitseg", "network.py", "{work}")

    def _scan(self, slices: str) -> None:
        self.run("kitseg", "scan_kitseg.py", "{work}", slices, f"{{work}}/scans/case_{int(slices):05d}.nii.gz")

    def _run(self, method: str, checkpoints: str) -> None:
        self.run("kitseg", "runs_kitseg.py", f"{{runs}}/{method}-{checkpoints}", method, checkpoints)


def bench_row(bench: Bench, row: Row, repeats: int | None) -> dict[str, Any]:
    """Measure a row, its sides in turn: medians, and the share of voxels on which labels agree."""
    for step in row.prepare:
        bench.prepare(step)
    found: dict[str, list[Measured]] = {side.name: [] for side in row.sides}
    labels = {side.name: bench.work / f"{row.name}-{number}.npy" for number, side in enumerate(row.sides)}
    for _ in range(repeats or row.repeats):
        for side in row.sides:
            out = labels[side.name] if row.labels else bench.work / "out"
            shutil.rmtree(out, ignore_errors=True)
            found[side.name].append(bench.run(side.environment, *side.command, out=out))
            print(f"{row.name}: {side.name} {found[side.name][-1]}", flush=True)
    first = labels[row.sides[0].name] if row.labels else None
    return {
        "title": row.title,
        "unit": row.unit,
        "target": row.target,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(bench.pythons["kitseg"]),
        "cases": "the cases of KITSEG_BENCH_CASES" if os.environ.get("KITSEG_BENCH_CASES") else "phantoms",
        "sides": {side.name: _summary(bench, side, found[side.name], labels, first) for side in row.sides},
    }


def _summary(
    bench: Bench, side: Side, found: list[Measured], labels: Mapping[str, Path], first: Path | None
) -> dict[str, Any]:
    middle: Callable[[str], float] = lambda name: statistics.median(getattr(one, name) for one in found)  # noqa: E731
    summary = {"value": middle("value"), "all": [one.value for one in found], "gb": middle("gb"), "cpu": middle("cpu")}
    more = {name: value for name, value in found[-1].more.items() if isinstance(value, int | float)}
    if first is not None and labels[side.name] != first:
        more |= _agreement(np.load(first), np.load(labels[side.name]))
    return {**summary, "more": more, "versions": versions(bench.pythons[side.environment], side.environment)}


def _agreement(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    both = {"same labels %": 100 * float((one == other).mean())}
    for name, value in (("kidney", 1), ("tumor", 2)):
        a, b = one == value, other == value
        if a.any() or b.any():
            both[f"Dice {name}"] = 2 * float((a & b).sum()) / float(a.sum() + b.sum())
    return both


def main() -> None:
    """Run the rows that are asked for, all that this machine can where none is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", nargs="*", help="names of rows, or how they begin")
    parser.add_argument("--python", action="append", default=[], help="ENVIRONMENT=PYTHON")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "explanation" / "benchmarks.md")
    given = parser.parse_args()
    work = Path(os.environ.get("KITSEG_BENCH_WORK", ROOT / ".nox" / "bench-work")).resolve()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, {"kitseg": sys.executable, **dict(pair.split("=", 1) for pair in given.python)})
    gpu = machine(sys.executable)["gpu"] is not None
    wanted = [row for row in ROWS if not given.rows or any(row.name.startswith(name) for name in given.rows)]
    results = read_results(given.page)
    for row in wanted:
        if row.gpu and not gpu:
            print(f"{row.name}: needs a GPU")
            continue
        results[row.name] = bench_row(bench, row, given.repeats)
        write_page(given.page, {row.name: results[row.name] for row in ROWS if row.name in results})


main()
