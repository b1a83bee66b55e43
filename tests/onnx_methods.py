"""ONNX files of all methods predict whole scans as PyTorch does: ``nox -s onnx``. A minute a method.

Arguments: RUN SCAN pairs to compare in place of the methods' quick runs on a phantom.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
from conftest import kitseg
from method_runs import METHODS, quick, run_of, working_folder
from torch import Tensor

from kitseg.inference.windows import Predict
from kitseg.models.bundles.onnx import export_onnx
from kitseg.models.members import Ensemble, open_ensemble
from kitseg.models.weights import Checkpoint
from kitseg.volumes.arrays import scan_from


@dataclass
class Onnx:
    """An engine: onnxruntime with the exported file of each checkpoint."""

    files: dict[Path, Path]
    outputs: tuple[str, ...]
    heads: tuple[str, ...]

    def __call__(self, weights: Checkpoint, head: int) -> Predict:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(self.files[weights.name]), options)
        name = f"probabilities_{self.heads[head]}"

        def predict(x: Tensor) -> Tensor:
            return torch.from_numpy(session.run([name], {"image": x.numpy()})[0])

        return predict


def with_onnx(ensemble: Ensemble, model: Path | str, folder: Path) -> Ensemble:
    """The same ensemble, whose networks onnxruntime runs."""
    exported = defaultdict(list)
    for row in export_onnx(model, folder):
        exported[row.fold, row.stage].append(row)
    (one,) = ensemble.models
    stages = {
        fold: {
            name: replace(
                stage,
                engine=Onnx(
                    dict(zip(stage.checkpoints, (folder / row.file for row in exported[fold, name]), strict=True)),
                    exported[fold, name][0].outputs,
                    stage.spec.heads,
                ),
            )
            for name, stage in chain.items()
        }
        for fold, chain in one.stages.items()
    }
    return replace(ensemble, models=(replace(one, stages=stages),))


def compare(model: Path | str, scan: Path, folder: Path) -> SimpleNamespace:
    """The share of voxels with PyTorch's label, in the scan and in what either finds, and the largest difference."""
    torch_ones = open_ensemble([model], "cpu", engine="torch")
    image = scan_from(scan)
    expected, found = torch_ones.predict(image), with_onnx(torch_ones, model, folder).predict(image)
    same, either = expected.canonical == found.canonical, (expected.canonical > 0) | (found.canonical > 0)
    near = [abs(np.float32(expected.probabilities[k]) - found.probabilities[k]).max() for k in expected.probabilities]
    return SimpleNamespace(
        voxels=same.size,
        same=same.mean(),
        foreground=int(either.sum()),
        same_there=same[either].mean() if either.any() else 1.0,
        difference=float(max(near)),
    )


def main(arguments: list[str]) -> None:
    bad = 0
    with TemporaryDirectory() as name:
        folder = Path(name)
        pairs = [(model, Path(scan)) for model, scan in zip(arguments[::2], arguments[1::2], strict=True)]
        if not pairs:
            done = kitseg(folder, "phantom", "source/data", "--cases=3", "--matrix=64", "--jobs=1")
            done = (
                done if done.code else kitseg(folder, "phantom", "source/test", "--cases=2", "--seed=1", "--matrix=64")
            )
            assert done.code == 0, done.text
        for method in [] if pairs else METHODS:
            place = working_folder(folder / method, folder / "source", cases=3)
            done = kitseg(place, "train", *quick(method))
            assert done.code == 0, done.text
            pairs.append((place / run_of(method), place / "test" / "case_00000" / "imaging.nii.gz"))
        for number, (model, scan) in enumerate(pairs):
            found = compare(model, scan, folder / f"onnx-{number}")
            print(
                f"{model}: {found.same:.4%} of {found.voxels} voxels, {found.same_there:.4%} of {found.foreground} in "
                f"either foreground; probabilities within {found.difference:.2g}",
                flush=True,
            )
            bad += found.same < 0.9999
    sys.exit(int(bad > 0))


if __name__ == "__main__":
    main(sys.argv[1:])
