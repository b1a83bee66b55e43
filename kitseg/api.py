"""kitseg as a library: arrays or paths in, arrays and figures out; nothing is printed, and failures are exceptions.

Every function does what the command of its name does. Label ids: 0 background, 1 kidney, 2 tumor (3 cyst, in the
convention kits23). Affines map voxel indices to millimetres in RAS+, as nibabel's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kitseg import config
from kitseg.config import Method
from kitseg.errors import KitsegError
from kitseg.measurement.findings import Findings
from kitseg.measurement.quality import Quality
from kitseg.models.members import Ensemble, open_ensemble
from kitseg.runtime.outcomes import Outcome
from kitseg.runtime.sharding import Share
from kitseg.scoring.case import CaseScore
from kitseg.types import Probabilities, Volume
from kitseg.volumes.arrays import labels_from, scan_from, to_nibabel
from kitseg.volumes.nifti import read_labels, turn_to_native
from kitseg.volumes.scan import check_grid, find_scans, read_scan

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
        return self._predict(_scan(scan, affine))

    def _predict(self, scan: Volume) -> Prediction:
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


def load_method(method: FilePath, size: str = "paper", overrides: Sequence[str] = ()) -> Method:
    """A method by its name or the path of its YAML file, resolved and checked.

    Args:
        method: such as ``two-phase``.
        size: one of the method's sizes.
        overrides: ``KEY=VALUE`` for any key of the configuration.

    Raises:
        UsageError: an unknown method, size or key.
    """
    return config.method_of(config.compose(str(method), size, overrides))


@overload
def predict(
    scans: Image | Sequence[Image], model: LoadedModel | FilePath | Sequence[FilePath], output: None = None
) -> list[Prediction]: ...
@overload
def predict(
    scans: FilePath | Sequence[FilePath], model: LoadedModel | FilePath | Sequence[FilePath], output: FilePath
) -> list[Outcome]: ...
def predict(
    scans: Image | Sequence[Image],
    model: LoadedModel | FilePath | Sequence[FilePath],
    output: FilePath | None = None,
) -> list[Prediction] | list[Outcome]:
    """Predict scans; with ``output`` as `kitseg predict` does, into that folder.

    Args:
        scans: one or several: files, folders of them or of DICOM series, or images (see ``LoadedModel.predict``).
        model: a loaded one, or what ``load_model`` takes.
        output: the folder for ``<id>.nii.gz``, ``<id>.json`` and ``<id>.png``; for scans in files only.

    Returns:
        A prediction for each scan; with ``output`` an outcome, which holds the label file, volumes in ml and flags.

    Raises:
        KitsegError: a scan can't be used; with ``output``, after the others are done.
    """
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    given = list(scans) if isinstance(scans, list | tuple) else [scans]
    if output is None:
        return [loaded._predict(scan) for scan in _scans(given)]
    from kitseg.commands.predict import PredictOptions, PredictScans

    found = find_scans([Path(str(path)) for path in given])
    work = PredictScans(lambda: loaded.ensemble, Path(output), PredictOptions(choices=found.choices))
    outcomes = work(found.cases, Share(), lambda _: None, lambda _: None)
    _raise_if([outcome.error for outcome in outcomes])
    return outcomes


def evaluate(
    prediction: Image | Prediction,
    reference: Image,
    affine: ArrayLike | None = None,
    protocol: str = "kits19",
    convention: str | None = None,
) -> CaseScore:
    """Score a label map against a reference.

    Args:
        prediction: a ``Prediction``, a NIfTI file, an array or an image.
        reference: the same kinds.
        affine: (4, 4), of arrays; that of the other label map where it is None.
        protocol: the challenge whose rules apply, kits19 or kits23.
        convention: what label ids mean, kits19 or kits23; the protocol's where it is None.

    Returns:
        Dice, surface Dice, distances in mm and volume errors by class, and the tumors found.

    Raises:
        InputError: a label map can't be used, or they lie on different grids. UsageError: no such protocol.
    """
    from kitseg.commands.evaluate import rules
    from kitseg.scoring.case import score

    by = rules(protocol, convention)
    if affine is None and isinstance(prediction, np.ndarray) and not isinstance(reference, np.ndarray):
        affine = _labels(reference, None, by.convention).native.affine
    found = _labels(prediction, affine, by.convention)
    truth = _labels(reference, found.native.affine if affine is None else affine, by.convention)
    check_grid(Path(found.case_id), found.geometry, truth.geometry)
    return score(found.array, truth.array, truth.geometry.spacing, by.protocol, by.convention)


def measure(
    labels: Image | Prediction,
    affine: ArrayLike | None = None,
    ct: Image | None = None,
    convention: str = "kits23",
) -> Findings:
    """Kidneys and lesions of a label map, in mm and ml; with the CT also in HU.

    Args:
        labels: a ``Prediction``, a NIfTI file, an array or an image.
        affine: (4, 4), of arrays.
        ct: the scan on the same grid: a file, an array or an image.
        convention: what label ids mean, kits19 or kits23.

    Raises:
        InputError: a file or an array can't be used, or they lie on different grids.
    """
    from kitseg.measurement.measure import measure as measure_labels

    found = _labels(labels, affine, convention)
    if ct is None:
        return measure_labels(found.array, found.geometry)
    scan = _scan(ct, found.native.affine if affine is None else affine)
    check_grid(Path(found.case_id), found.geometry, scan.geometry)
    return measure_labels(found.array, found.geometry, scan.array)


def _scan(scan: Image, affine: ArrayLike | None) -> Volume:
    if not isinstance(scan, Path | str):
        return scan_from(scan, affine)
    cases = find_scans([Path(scan)]).cases
    if len(cases) != 1:
        raise KitsegError(f"{scan} holds {len(cases)} scans to segment; give one, or call kitseg.predict")
    return read_scan(cases[0])


def _scans(given: Sequence[Image]) -> Iterator[Volume]:
    for scan in given:
        if isinstance(scan, Path | str):
            yield from map(read_scan, find_scans([Path(scan)]).cases)
        else:
            yield scan_from(scan)


def _labels(labels: Image | Prediction, affine: ArrayLike | None, convention: str) -> Volume:
    if isinstance(labels, Path | str):
        return read_labels(Path(labels), Path(labels).name, convention)
    if isinstance(labels, Prediction):
        return labels_from(labels.labels, labels.affine, convention, labels.case)
    return labels_from(labels, affine, convention)


def _raise_if(errors: Sequence[str]) -> None:
    if failed := [error for error in errors if error]:
        raise KitsegError("; ".join(failed))
