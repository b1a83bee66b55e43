"""The models whose probabilities are averaged: runs, and the members of an ensemble file or a model bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kitseg import ensemble
from kitseg.errors import UsageError
from kitseg.labels import KITS19, Scheme, to_kits19
from kitseg.measurement.confidence import find_signs
from kitseg.measurement.findings import Findings
from kitseg.measurement.flags import Quality
from kitseg.measurement.model_flags import TrainingDomain
from kitseg.measurement.quality import assess
from kitseg.models.builtin import BUILTIN, open_builtin
from kitseg.models.bundles.address import SCHEME, fetch_bundle
from kitseg.models.bundles.archive import MANIFEST
from kitseg.models.bundles.bundle import Bundle, open_bundle
from kitseg.models.chain import run_chain, to_scan
from kitseg.models.ensemble_file import Member, read_ensemble
from kitseg.models.model import Model, open_model
from kitseg.models.origin import describe_model, origin, origin_path
from kitseg.models.postprocessing import build_steps, clean, outlined
from kitseg.models.run_folder import of_fold
from kitseg.models.training_domain import merge_domains
from kitseg.postprocess import Prior
from kitseg.types import Probabilities, Volume
from kitseg.volumes.arrays import Image, scan_from, to_nibabel
from kitseg.volumes.names import BUNDLE
from kitseg.volumes.nifti import turn_to_native


@dataclass(frozen=True)
class Prediction:
    """What models find in a scan.

    canonical: labels (D, H, W) in orientation (I, P, L) with kitseg's ids, cleaned by the post-processing; proba: the
    probabilities that they follow from; findings: kidneys and lesions in mm, ml and HU; quality: flags with their
    reasons, and the contrast phase; agreement: Dice between the members of an ensemble by class, None for a single
    member; signs: of how well the tumor is outlined (``find_signs``); scheme: of the labels in files.
    """

    canonical: NDArray[np.uint8]
    proba: Probabilities
    findings: Findings
    quality: Quality
    agreement: Mapping[str, float] | None
    signs: Mapping[str, float]
    scheme: Scheme = KITS19

    @cached_property
    def labels(self) -> NDArray[np.uint8]:
        """The labels in the scan's own shape and axes, with the ids of the scheme."""
        return np.ascontiguousarray(turn_to_native(self.scheme.to_file[self.canonical], self.proba.native))

    @property
    def affine(self) -> NDArray[np.float64]:
        """(4, 4), from the labels' voxel indices to mm in RAS+."""
        return self.proba.native.affine

    @property
    def image(self) -> Any:
        """The labels as a nibabel image."""
        return to_nibabel(self.labels, self.proba.native)

    @cached_property
    def probabilities(self) -> dict[str, NDArray[np.float16]]:
        """The probabilities by channel, each in the scan's own shape and axes."""
        found = {}
        for channel, values in zip(self.proba.channels, self.proba.array, strict=True):
            whole = np.full(self.proba.geometry.shape, channel == "background", np.float16)
            whole[self.proba.box.slices] = values
            found[channel] = turn_to_native(whole, self.proba.native)
        return found


@dataclass(frozen=True)
class Ensemble:
    """Opened models with their weights, and the post-processing of their mean."""

    models: tuple[Model, ...]
    weights: tuple[float, ...]
    postprocess: Mapping[str, Any]

    def predict(
        self, image: Image | Volume, affine: ArrayLike | None = None, scheme: Scheme | None = None
    ) -> Prediction:
        """Labels, probabilities, findings and quality flags of one scan.

        Args:
            image: a NIfTI file or the folder of a DICOM series, an array in HU with its ``affine``, an image of
                nibabel, SimpleITK or TorchIO, or a scan that has been read.
            affine: (4, 4), from an array's voxel indices to mm in RAS+.
            scheme: of the labels; None: that of the model's training. In one without cysts, they are kidney.

        Raises:
            InputError: it can't be used. UsageError: a folder with several scans.
        """
        scan = image if isinstance(image, Volume) else scan_from(image, affine)
        probabilities, agreement = self.predict_proba(scan)
        labels = clean(probabilities, scan, self.steps)
        scheme = scheme or self.models[0].method.labels
        return judge(labels, probabilities, scan, agreement, self.training_domain, scheme)

    def predict_proba(self, scan: Volume) -> tuple[Probabilities, dict[str, float] | None]:
        """The weighted mean over the models and their folds, which share a model's weight; and how far they agree.

        Several models are in main memory one at a time. The agreement is by class, None for a single member.
        """
        mean, votes = ensemble.Mean(), ensemble.EnsembleAgreement()
        channels = ensemble.common_channels([tuple(model.outputs) for model in self.models])
        most = max(len(model.folds) for model in self.models)
        for model, weight in zip(self.models, self.weights, strict=True):
            for stages in model.stages.values():
                member = ensemble.convert(to_scan(run_chain(scan, stages, model.heads), model.outputs, scan), channels)
                votes.add(member)
                mean.add(member, weight * most / len(model.folds))
            if len(self.models) > 1:
                model.release()
        return mean.result(), votes.agreement()

    @cached_property
    def steps(self) -> list[Prior]:
        """The priors of the post-processing, in order."""
        return build_steps(self.postprocess)

    @cached_property
    def training_domain(self) -> TrainingDomain | None:
        """What the models saw in training, taken together; None where one of them doesn't state it."""
        return merge_domains([model.run.read_info().experience for model in self.models])

    @property
    def loses(self) -> str:
        """What the mean can't show though one of its models finds it, as a line; empty where nothing is lost."""
        return ensemble.lost_classes([(origin_path(model), [*model.outputs]) for model in self.models])

    def origin(self) -> list[dict[str, Any]]:
        """The models of a result, with their weights."""
        pairs = zip(self.models, self.weights, strict=True)
        return [{**origin(model), "weight": weight} for model, weight in pairs]

    def describe(self) -> str:
        """The models, a line each, and what can't be checked."""
        lines = [*map(describe_model, self.models), *filter(None, [self.loses])]
        if self.training_domain is None:
            lines.append("contrast phase and spacing are not checked: the model doesn't state its training data")
        infos = [model.run.read_info() for model in self.models]
        if not all(info.learned for info in infos):
            lines.append("scans that it learned from are not marked: the model doesn't state them")
        elif not all(info.hu_known for info in infos):
            lines.append("scans that it learned from are marked in the files that it learned from only")
        return "\n".join(lines)


def judge(
    labels: NDArray[np.uint8],
    found: Probabilities,
    scan: Volume,
    agreement: Mapping[str, float] | None,
    domain: TrainingDomain | None,
    scheme: Scheme,
) -> Prediction:
    """Measure cleaned labels, with flags and signs, as ``scheme`` has them; agreement, domain: see ``assess``."""
    from kitseg.measurement.measure import measure  # trimesh and networkx take long to import

    labels = labels if scheme.cyst else to_kits19(labels)
    findings = measure(labels, scan.geometry, scan.array)
    quality = assess(labels, scan.array, scan.geometry, findings, agreement, domain, outlined(found))
    return Prediction(labels, found, findings, quality, agreement, find_signs(labels, found, agreement), scheme)


def open_ensemble(
    paths: Sequence[Path | str],
    device: str,
    weights: Sequence[float] = (),
    mirror: bool = False,
    engine: str = "auto",
    precision: str = "auto",
    fold: int | None = None,
) -> Ensemble:
    """Open runs, folds of runs, ensemble files and bundles; the post-processing is the first one's.

    weights: of these models, whose members share them; what has a weight of 0 is left out; engine, precision: see
    ``open_model``; fold: of runs, use this one's networks only.

    Raises:
        UsageError: not a run, or weights that don't fit. InputError: a damaged file, or an unfinished run.
    """
    shares = list(weights) if weights else [1.0] * len(paths)
    if len(shares) != len(paths) or not ensemble.can_weigh(shares):
        raise UsageError(
            f"{len(paths)} model(s), but the weights {shares}: give each model one, 0 or more, and not all 0"
        )
    members, recipes = [], []
    for path, share in zip(paths, shares, strict=True):
        if not share:
            continue
        found, recipe = members_of(path)
        total = sum(m.weight for m in found) if len(paths) > 1 else 1.0
        members += [replace(m, weight=share * m.weight / total, mirror=mirror or m.mirror) for m in found]
        recipes.append(recipe)
    models = tuple(
        open_model(of_fold(member.run, fold), device, mirror=member.mirror, engine=engine, precision=precision)
        for member in members
    )
    steps = models[0].method.postprocess if recipes[0] is None else recipes[0]
    return Ensemble(models, tuple(member.weight for member in members), steps)


def locate(model: Path | str) -> Path:
    """Where a model lies; one in a bundle or at an address ``hf://owner/name@revision`` is unpacked into the cache.

    ``builtin`` is the network that ships with kitseg.

    Raises:
        UsageError: no such file, folder or address. KitsegError: it can't be fetched. InputError: a damaged bundle.
    """
    if model == BUILTIN:
        return open_builtin().path
    if isinstance(model, str) and model.startswith(SCHEME):
        return fetch_bundle(model).path
    path = Path(model)
    if path.suffix == BUNDLE and not path.is_dir():
        return open_bundle(path).path
    if not path.exists():
        kinds = f"a run, a fold of one, an ensemble file, a bundle ({BUNDLE}), {SCHEME}owner/name@revision or {BUILTIN}"
        raise UsageError(f"{path}: there is no such model. Give {kinds}")
    return path


def members_of(model: Path | str) -> tuple[list[Member], Mapping[str, Any] | None]:
    """What a run, a fold, an ensemble file, a bundle or an address stands for; for the first two the method's steps.

    Raises:
        See ``locate`` and ``read_ensemble``.
    """
    path = locate(model)
    if (path / MANIFEST).is_file():
        return Bundle(path).members()
    return read_ensemble(path) if path.is_file() else ([Member(path)], None)


def only_member(model: Path | str) -> tuple[Member, Mapping[str, Any] | None]:
    """The run or fold that a model stands for, and the post-processing chosen for it; None: the method's own.

    Raises:
        UsageError: it stands for several.
    """
    members, steps = members_of(model)
    if len(members) > 1:
        raise UsageError(f"{model} stands for {len(members)} runs, which only `kitseg predict` averages")
    return members[0], steps
