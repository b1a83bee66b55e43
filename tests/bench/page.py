"""The page of results: a table below a hand-written introduction, and beside it the numbers as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil

MARK = "<!-- Below this line `nox -s bench` writes. -->"
ENVIRONMENTS = {
    "kitseg": ("kitseg", "torch", "torchio", "numpy"),
    "nnunetv2": ("nnunetv2", "torch"),
    "monai": ("monai", "torch"),
    "torchio": ("torchio", "torch"),
}
ASK_VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
ASK_GPU = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


@cache
def versions(python: str, environment: str) -> dict[str, str]:
    """What is installed where a side ran."""
    found: dict[str, str] = json.loads(_said(python, ASK_VERSIONS, *ENVIRONMENTS[environment]))
    return found


@cache
def machine(python: str) -> dict[str, str | None]:
    """The hardware and the system."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": f"{name}, {len(os.sched_getaffinity(0))} cores",
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "gpu": _said(python, ASK_GPU).strip() or None,
        "python": platform.python_version(),
    }


def read_results(page: Path) -> dict[str, Any]:
    """The rows that were measured before."""
    numbers = page.with_suffix(".json")
    results: dict[str, Any] = json.loads(numbers.read_text()) if numbers.exists() else {}
    return results


def write_page(page: Path, results: Mapping[str, Any]) -> None:
    """Write the table below the introduction, which stays as it is, and the numbers."""
    page.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    introduction = page.read_text().partition(MARK)[0] if page.exists() else "# Benchmarks\n\n"
    page.write_text(f"{introduction}{MARK}\n\n{table(results)}\n{circumstances(results)}")


def table(results: Mapping[str, Any]) -> str:
    """Markdown: a line a side, kitseg's ratio to it in the peer's line."""
    lines = [
        "| work | side | median | all | peak memory, GB | processor s | kitseg is … times as fast | … of its memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results.values():
        first, *_ = result["sides"].values()
        title = result["title"] + (f" (target: {result['target']})" if result["target"] else "")
        for name, side in result["sides"].items():
            ratio, share = _against(first, side, result["unit"]) if side is not first else ("", "")
            more = "; ".join(f"{key} {value:.6g}" for key, value in side["more"].items())
            every = ", ".join(_number(value) for value in side["all"])
            cells = [
                title,
                name + (f" ({more})" if more else ""),
                f"{_number(side['value'])} {result['unit']}",
                every,
                f"{side['gb']:.2f}",
                f"{side['cpu']:.1f}",
                ratio,
                share,
            ]
            lines.append("| " + " | ".join(cells) + " |")
            title = ""
    return "\n".join(lines) + "\n"


def circumstances(results: Mapping[str, Any]) -> str:
    """When, on what and with which versions; rows that share them stand together."""
    groups: dict[str, list[str]] = {}
    for name, result in results.items():
        here = result["machine"]
        found = {k: v for side in result["sides"].values() for k, v in side["versions"].items()}
        parts = [result["date"], here["cpu"], here["memory"], here["gpu"] or "no GPU", f"Python {here['python']}"]
        parts += [f"{package} {version}" for package, version in sorted(found.items())]
        groups.setdefault(", ".join([*parts, f"cases: {result['cases']}"]), []).append(name)
    lines = [f"- {', '.join(names)}: {text}" for text, names in groups.items()]
    return "\n" + "\n".join(lines) + "\n"


def _against(kitseg: Mapping[str, Any], peer: Mapping[str, Any], unit: str) -> tuple[str, str]:
    faster = peer["value"] / kitseg["value"] if unit == "s" else kitseg["value"] / peer["value"]
    return f"{faster:.1f}", f"{kitseg['gb'] / peer['gb']:.2f}"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _said(python: str, program: str, *arguments: str) -> str:
    return subprocess.run([python, "-c", program, *arguments], check=True, capture_output=True, text=True).stdout
