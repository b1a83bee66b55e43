"""The container of docs/grand-challenge on a scan of the sample, as the platform runs it: ``nox -s container``.

With a docker engine the image is built and run. Without one, the steps of both recipes are executed in a clean folder,
and the entry point runs without a network, with a read-only input; which steps can't be executed is printed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import SimpleITK as sitk

ROOT = Path(__file__).parents[1]
BASE, RECIPE = ROOT / "docs" / "cluster" / "Dockerfile", ROOT / "docs" / "grand-challenge" / "Dockerfile"
SCAN = ROOT / "kitseg" / "samples" / "hcc_007b" / "imaging.nii.gz"


def instructions(recipe: Path) -> list[tuple[str, str]]:
    """The instructions of a recipe with their arguments."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", recipe.read_text()))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


def execute(root: Path) -> list[str]:
    """Execute the steps of both recipes below ``root`` in place of /; the entry point."""
    environment = {**os.environ, "TORCH_INDEX": os.environ.get("TORCH_INDEX", "")}
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    entry: list[str] = []
    for word, rest in [*instructions(BASE), *instructions(RECIPE)]:
        command = re.sub(r"(?<![\w.])/(src|opt/kitseg)", rf"{root}/\1", rest)
        if word == "COPY" and rest == ". /src":
            for name in BASE.with_name("Dockerfile.dockerignore").read_text().split()[1:]:
                place, to = ROOT / name[1:], root / "src" / name[1:]
                to.parent.mkdir(exist_ok=True)
                skip = shutil.ignore_patterns("__pycache__", "*.so")
                shutil.copytree(place, to, symlinks=True, ignore=skip) if place.is_dir() else shutil.copy(place, to)
        elif word == "RUN" and "useradd" not in rest:
            command = command if environment["TORCH_INDEX"] else command.replace('--extra-index-url "$TORCH_INDEX"', "")
            subprocess.run(["sh", "-c", command], check=True, env=environment)
        elif word == "ENTRYPOINT":
            entry = json.loads(rest)
        else:
            print(f"not executed: {word} {rest}", flush=True)
            continue
        print(f"executed: {word} {command}", flush=True)
    return [str(root / "opt/kitseg/bin" / entry[0]), *entry[1:]]


def run(command: list[str], folder: Path) -> None:
    """Run the entry point with no network, a read-only input and HOME, and only its output and /tmp writable."""
    inside = [
        *("mount --bind input input", "mount -o remount,ro,bind input", "touch input/x 2>/dev/null && exit 9"),
        "exec env -i PATH=/usr/bin:/bin HOME=/nowhere MPLCONFIGDIR=/tmp/matplotlib "
        + shlex.join([*command, "--input=input", "--output=output"]),
    ]
    subprocess.run(["unshare", "--net", "--mount", "sh", "-c", "\n".join(inside)], check=True, cwd=folder)


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        source, output = folder / "input" / "images" / "abdomen-ct", folder / "output"
        source.mkdir(parents=True)
        output.mkdir(mode=0o777)
        sitk.WriteImage(ct := sitk.ReadImage(SCAN), source / "0a1b.mha")
        inputs = [{"socket": {"slug": "abdomen-ct", "relative_path": "images/abdomen-ct"}}]
        (folder / "input" / "inputs.json").write_text(json.dumps(inputs))
        engine = subprocess.run(["docker", "info", "--format={{.ServerVersion}}"], capture_output=True).returncode == 0
        if shutil.which("docker") and engine:
            image = "kitseg-algorithm-test"
            subprocess.run(["docker", "build", "-f", BASE, "-t", "kitseg", ROOT], check=True)
            subprocess.run(["docker", "build", "-f", RECIPE, "-t", image, RECIPE.parent], check=True)
            mounts = ["-v", f"{folder}/input:/input:ro", "-v", f"{output}:/output"]
            isolated = ["--network=none", "--read-only", "--tmpfs=/tmp"]
            subprocess.run(["docker", "run", "--rm", *isolated, *mounts, image], check=True)
        else:
            print("no docker engine: the steps of the recipe, one by one", flush=True)
            run(execute(folder), folder)
        labels = sitk.ReadImage(output / "images" / "kidney-tumor-segmentation" / "output.mha")
        places = ("GetSize", "GetSpacing", "GetOrigin", "GetDirection")
        grids = [[getattr(one, name)() for name in places] for one in (labels, ct)]
        assert all(np.allclose(*pair, atol=1e-5) for pair in zip(*grids, strict=True)), grids
        counts = np.bincount(sitk.GetArrayFromImage(labels).ravel())
        assert counts.size > 1, "nothing was found"
        print(f"on the grid of the input; voxels of each label: {counts.tolist()}")


if __name__ == "__main__":
    sys.exit(main())
