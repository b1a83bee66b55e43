"""What kitseg does on a GPU in ten minutes, in order of worth; each result is written as it comes.

    python tests/gpu/ten_minutes.py --minutes 9 --out DIR [--bodies DIR --lesions DIR] [--device cpu]

1. Every method at `paper` (resenc: M; on a CPU `tiny`): does a step run, samples/s with and without loading, TFLOP/s,
   peak memory against the plan's; nnU-Net's residual encoder of the same size beside it where it is installed.
2. The networks' passes over a full-size case: seconds and memory.
3. For the rest of the time, resenc `small` (CPU: `tiny`) learns: on synthetic patients where `--bodies` names CTs with
   kidney masks, else on phantoms. Then it predicts a case it has not seen, through `kitseg predict`.

DIR gets results.json, results.md and the trained bundle. The same call again skips what is there and resumes the
training; its working files are in --work. `--only-kit` refuses to import anything beyond MACHINE and KIT below.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import measures

#: Packages of the machine, with all that they require; and those taken there, each without what it requires.
MACHINE = (
    *("torch", "pytorch-lightning", "typer", "rich", "matplotlib", "scikit-image", "joblib", "safetensors", "jinja2"),
    *("tensorboard", "huggingface_hub"),
)
KIT = (
    *(
        "torchio",
        "simpleitk",
        "nibabel",
        "hydra-core",
        "omegaconf",
        "antlr4-python3-runtime",
        "connected-components-3d",
    ),
    *("edt", "isal", "trimesh", "pydicom", "highdicom", "pydantic", "pydantic-core", "annotated-types", "filelock"),
    *("typing-inspection", "typing-extensions", "deprecated", "wrapt", "jaxtyping"),
    *("wadler-lindig", "einops", "humanize", "msgspec"),
)
METHODS = ("resenc", "two-phase", "two-stage", "guided-unetpp", "dual-unet", "progressive")
STEPS_UNTIL, PREDICT_UNTIL, TRAIN_UNTIL, STOP = 0.2, 0.3, 0.88, 0.94  # shares of the time
KIDNEYS = 0.35  # of the training's time


class OnlyKit:
    """Finds modules as Python does, without those that neither the machine nor the kit has."""

    def __init__(self) -> None:
        allowed, todo = {_plain(name) for name in KIT}, [_plain(name) for name in MACHINE]
        while todo:
            if (name := todo.pop()) not in allowed:
                allowed.add(name)
                with suppress(importlib.metadata.PackageNotFoundError):
                    needs = importlib.metadata.requires(name) or []
                    todo += [_plain(re.split(r"[^\w.-]", need)[0]) for need in needs if "extra ==" not in need]
        owners = importlib.metadata.packages_distributions()
        self.refused = {top for top, names in owners.items() if not {_plain(n) for n in names} & {*allowed, "kitseg"}}
        self.finders: list[Any] = list(sys.meta_path)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The module's specification; None where it is not there."""
        if name.partition(".")[0] in self.refused:
            return None
        return next((found for finder in self.finders if (found := finder.find_spec(name, path, target))), None)

    def find_distributions(self, *context: Any) -> Any:
        """The installed packages, as ``importlib.metadata`` asks for them."""
        there = (getattr(finder, "find_distributions", None) for finder in self.finders)
        return (found for find in there if find for found in find(*context))


@dataclass
class Box:
    """The clock, the options, and the results so far, by name."""

    given: argparse.Namespace
    begun: float = field(default_factory=time.monotonic)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.given.out.mkdir(parents=True, exist_ok=True)
        self.path = self.given.out / "results.json"
        if self.path.exists():
            self.rows = json.loads(self.path.read_text())

    def left(self, share: float) -> float:
        """Seconds until this share of the time is over."""
        return self.begun + 60 * self.given.minutes * share - time.monotonic()

    def once(self, name: str, until: float, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure and write a row, unless it is there or the time for it is over."""
        if name in self.rows and "error" not in self.rows[name]:
            return
        if self.left(until) < 0:
            print(f"{name}: no time left", flush=True)
            return
        try:
            self.rows[name] = measure()
        except Exception as error:
            traceback.print_exc()
            self.rows[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(name, self.rows[name], flush=True)
        self.write()

    def write(self) -> None:
        """All rows as JSON, and as a table of those with the same columns."""
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")
        tables: dict[tuple[str, ...], list[str]] = {}
        for name, row in self.rows.items():
            cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
            tables.setdefault(tuple(row), []).append(f"| {' | '.join([name, *cells])} |")
        head = (f"| row | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n" for columns in tables)
        text = "\n".join(top + "\n".join(lines) + "\n" for top, lines in zip(head, tables.values(), strict=True))
        self.path.with_suffix(".md").write_text(text)


def main(arguments: list[str] | None = None) -> None:
    """Run the boxes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "kitseg-ten-minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--bodies", type=Path, help="CTs with kidney masks, to train on synthetic patients")
    parser.add_argument("--lesions", type=Path, help="label maps whose tumors and cysts give shapes")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--boxes", nargs="+", type=int, default=(1, 2, 3))
    parser.add_argument("--only-kit", action="store_true")
    given = parser.parse_args(arguments)
    box = Box(given)
    if given.only_kit:
        sys.meta_path[:] = [OnlyKit()]
    import measures

    tasks = measures.Tasks(given.work, given.device)
    box.once("machine", 1, tasks.machine)
    box.once("cases", 1, lambda: tasks.prepare(given.methods))
    stages = [(method, stage) for method in given.methods for stage in tasks.stages(method)]
    for number, (method, stage) in enumerate(stages if 1 in given.boxes else []):
        seconds = max(0.1, min(5 if tasks.gpu else 0.5, box.left(STEPS_UNTIL) / (len(stages) - number)))
        box.once(f"step {method} {stage}", STEPS_UNTIL, partial(tasks.step, method, stage, seconds))
    if 1 in given.boxes and find_spec("dynamic_network_architectures"):
        box.once("step nnU-Net's network", PREDICT_UNTIL, tasks.nnunet_step)
    for method in given.methods if 2 in given.boxes else []:
        box.once(f"predict {method}", PREDICT_UNTIL, partial(tasks.predict, method))
    if 3 in given.boxes:
        train(box, tasks)


def train(box: Box, tasks: measures.Tasks) -> None:
    """Train resenc until nearly the end, then predict the full-size case with it."""
    given, size = box.given, tasks.sizes["small"]
    source = ["--data", given.bodies or given.work / "data"]
    source += ["--set=data.source=synthesis"] if given.bodies else []
    source += [f"--set=data.lesions={given.lesions}"] if given.lesions else []
    places = {"store": "train-stored", "split": "splits.json", "runs": "runs"}
    common = ["train", "--method=resenc", f"--size={size}", "--device", given.device, *tasks.jobs, *source]
    common += [f"--{name}={given.work / place}" for name, place in places.items()]

    def epochs() -> dict[str, Any]:
        """How many fit into the time, from two epochs of each stage in a run of their own."""
        found, seconds = {}, box.left(TRAIN_UNTIL)
        for stage, share in (("kidneys", KIDNEYS), ("masses", 1 - KIDNEYS)):
            begun = time.monotonic()
            tasks.kitseg(*common, "--name=trial", f"--stage={stage}", "--epochs=2")
            spent = (time.monotonic() - begun) / 2
            found[stage] = max(2, int((seconds * share - 2 * spent) / spent))
        return found

    box.once("epochs", TRAIN_UNTIL, epochs)
    chosen = box.rows.get("epochs", {"error": ""})
    if "error" in chosen or "trained" in box.rows:
        return
    more = [f"--set=stages.{stage}.epochs={count}" for stage, count in chosen.items()]
    more += [f"--set=stages.{stage}.validate_every={max(1, count // 4)}" for stage, count in chosen.items()]
    if box.left(STOP) < 0:
        print("training: no time left", flush=True)
    elif tasks.stopped_after(box.left(STOP), *common, "--name=ten", *more):
        print("training: stopped by the clock; the same call resumes it", flush=True)
    else:
        box.once("trained", 2, partial(tasks.trained, given.out / f"resenc-{size}.kitseg"))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
