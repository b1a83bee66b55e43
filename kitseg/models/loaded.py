"""Models in memory that predict scans from files, arrays and images of other libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kitseg.errors import UsageError
from kitseg.measurement.findings import Findings
from kitseg.measurement.quality import Quality
from kitseg.models.members import Ensemble, open_ensemble
from kitseg.types import Probabilities, Volume
from kitseg.volumes.arrays import scan_from, to_nibabel
from kitseg.volumes.nifti import turn_to_native
from kitseg.volumes.scan import find_scans, read_scan

FilePath = Path | str
#: A path, an array (with an affine), or an image of nibabel, SimpleITK or TorchIO.
Image = Any


@dataclass(frozen=True)
class Prediction:
    """What a model finds in a scan.

    case: the scan's name; labels: uint8 in the scan's own shape and axes; affine: (4, 4); findings: kidneys and
    lesions in mm, ml and HU; quality: flags with their reasons, and the contrast phase; agreement: Dice between the
    members of an ensemble by class, None for a single member.
    """

    case: str
    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]
    findings: Findings
    quality: Quality
    agreement: Mapping[str, float] | None
    on_grid: Probabilities

    @cached_property
    def probabilities(self) -> dict[str, NDArray[np.float16]]:
        """The probabilities by channel, each in the scan's own shape and axes."""
        found = self.on_grid
        return {name: self._whole(name, values) for name, values in zip(found.channels, found.array, strict=True)}

    @property
    def image(self) -> Any:
        """The labels as a nibabel image."""
        return to_nibabel(self.labels, self.affine)

    def _whole(self, channel: str, values: NDArray[np.float16]) -> NDArray[np.float16]:
        whole = np.full(self.on_grid.geometry.shape, channel == "background", np.float16)
        whole[self.on_grid.box.slices] = values
        return turn_to_native(whole, self.on_grid.native)


@dataclass(frozen=True)
class LoadedModel:
    """Trained models in memory, which predict any number of scans."""

    ensemble: Ensemble

    def predict(self, scan: Image, affine: ArrayLike | None = None) -> Prediction:
        """Labels, probabilities, findings and quality flags of one scan.

        Args:
            scan: a NIfTI file or the folder of a DICOM series, an array in HU with its ``affine``, or an image of
                nibabel, SimpleITK or TorchIO.
            affine: (4, 4), for arrays only.

        Raises:
            InputError: it can't be used. UsageError: a folder with several scans.
        """
        return self.predict_volume(read_any_scan(scan, affine))

    def predict_volume(self, scan: Volume) -> Prediction:
        """The same for a scan that has been read."""
        found, native = self.ensemble.predict(scan), scan.native
        labels = np.ascontiguousarray(turn_to_native(found.labels, native))
        return Prediction(
            scan.case_id, labels, native.affine, found.findings, found.quality, found.agreement, found.probabilities
        )


def load_model(
    model: FilePath | Sequence[FilePath],
    device: str = "auto",
    engine: str = "auto",
    precision: str = "auto",
    mirror: bool = False,
) -> LoadedModel:
    """Load a run, a fold of one, an ensemble file or a bundle, or several, whose probabilities are averaged.

    Args:
        model: paths, or addresses such as ``hf://owner/name@revision``.
        device: auto, cpu or cuda.
        engine: auto (OpenVINO on a CPU where it is installed), torch or openvino.
        precision: auto (the training's on a GPU, float32 on a CPU), f32 or bf16.
        mirror: test-time augmentation, left-right flip.

    Raises:
        UsageError: not a model, or a device or engine that isn't there. InputError: unfinished or damaged.
    """
    paths = [model] if isinstance(model, Path | str) else list(model)
    return LoadedModel(open_ensemble(paths, device, mirror=mirror, engine=engine, precision=precision))


def read_any_scan(scan: Image, affine: ArrayLike | None = None) -> Volume:
    """A scan from anything that ``LoadedModel.predict`` takes.

    Raises:
        InputError: it can't be used. UsageError: a folder with several scans.
    """
    if not isinstance(scan, Path | str):
        return scan_from(scan, affine)
    cases = find_scans([Path(scan)]).cases
    if len(cases) != 1:
        raise UsageError(f"{scan} holds {len(cases)} scans to segment; give one, or call kitseg.predict")
    return read_scan(cases[0])
