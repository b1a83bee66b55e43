"""How well the tumor of a case is outlined, expected from its probabilities, and probabilities that are calibrated.

The expected tumor Dice is a constant plus weighted signs, by ridge regression on cases that the model didn't learn
from. Orderings of cases by trust are compared by risk and coverage (Geifman and El-Yaniv, NeurIPS 2017): the mean loss,
1 − Dice, of the most trusted cases, and its mean over all their numbers (AURC).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from kitseg.labels import BACKGROUND, CYST, KIDNEY, TUMOR
from kitseg.measurement.flags import AMBER, LEVELS, Flag, Quality
from kitseg.types import Probabilities

FAILED = 0.5  # a tumor Dice below it is a failure
REVIEWED = 0.2  # of the cases, those with the lowest expected Dice, are flagged
LEAST = 19  # cases
FLAG = "expected-dice"
AGREEMENT = "tumor_agreement"
_PENALTY, _FOLDS, _VOXELS, _SEED = 1.0, 10, 20_000, 20
_TINY, _LARGEST = 1e-6, 1e9

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DiceModel:
    """Expects the tumor Dice of a case: ``constant`` plus each sign times its weight, which may lie beyond 0 and 1.

    doubtful: the expected Dice that a fifth of the cases fell below, out of fold.

    Raises:
        ValueError: a number beyond 1e9.
    """

    constant: float
    weights: Mapping[str, float]
    doubtful: float

    def __post_init__(self) -> None:
        if not all(abs(number) <= _LARGEST for number in (self.constant, self.doubtful, *self.weights.values())):
            raise ValueError("the model of the expected Dice has numbers that are too large")

    def expect(self, signs: Mapping[str, float]) -> float | None:
        """The expected Dice; None where a sign is missing, such as the agreement of a single network."""
        if not self.weights.keys() <= signs.keys():
            return None
        return self.constant + sum(weight * signs[name] for name, weight in self.weights.items())


@dataclass(frozen=True)
class Ordering:
    """An ordering of cases by trust.

    aurc: area under its curve; curve: mean loss of the most trusted case, the two most trusted and so on; caught: how
    many failures are among the least trusted fifth, where ties count by their expectation.
    """

    aurc: float
    curve: tuple[float, ...]
    caught: float


@dataclass(frozen=True)
class Confidence:
    """What the errors of a model on cases that it didn't learn from teach about others.

    reviewed, failed: numbers of cases in a fifth of all, and with a Dice below 0.5; orderings: the fitted one out of
    fold, that of the quality flags, that of the members' agreement where there are several, and the best one that there
    can be; temperature: by which the logarithms of probabilities are divided, None where it wasn't fitted; models:
    names of the runs or bundles that it was fitted to, empty where unknown.

    Raises:
        ValueError: the temperature is not within 0.1 and 10, or there are fewer than 19 cases.
    """

    reviewed: int
    cases: int
    failed: int
    model: DiceModel
    orderings: Mapping[str, Ordering]
    temperature: float | None = None
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.cases < LEAST or not 0.1 <= (1 if self.temperature is None else self.temperature) <= 10:
            raise ValueError(f"a temperature not within 0.1 and 10, or fewer than {LEAST} cases")

    def judge(self, signs: Mapping[str, float], quality: Quality) -> Quality:
        """A case's quality with a flag where its expected Dice is among the lowest fifth."""
        expected = self.model.expect(signs)
        if expected is None or expected >= self.model.doubtful:
            return quality
        reason = (
            f"The expected Dice of the tumor labels is {min(max(expected, 0), 1):.2f}, among the lowest fifth of the "
            f"{self.cases} cases that this was fitted to: a tumor may be missed, false or badly outlined."
        )
        return Quality((*quality.flags, Flag(FLAG, AMBER, reason)), quality.phase)


def find_signs(
    labels: NDArray[np.uint8], found: Probabilities, agreement: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Signs of how well a case is outlined.

    ``tumor_found`` (1 or 0); ``tumor_overlap`` and ``kidney_overlap``, the Dice that labels have with the probabilities
    of tumor and of foreground; ``tumor_elsewhere``, log10 of 1 plus the expected ml of tumor without a tumor label;
    ``tumor_missed``, the same where no tumor is labelled; ``cyst``, log10 of 1 plus the expected ml of cyst;
    ``tumor_agreement`` of an ensemble's members.

    Args:
        labels: (D, H, W), cleaned, with kitseg's ids.
        found: the probabilities that they follow from.
        agreement: Dice of an ensemble's members by class.
    """
    inside, channel = labels[found.box.slices], dict(zip(found.channels, found.array, strict=True))
    tumor, total = channel["tumor"], float(channel["tumor"].sum(dtype=np.float64))
    mask = inside == TUMOR
    hit = float(tumor[mask].sum(dtype=np.float64))
    ml, cyst = found.geometry.voxel_ml, channel.get("cyst", tumor[:0])
    elsewhere = float(np.log10(1 + (total - hit) * ml))
    signs = {
        "tumor_found": float(mask.any()),
        "tumor_overlap": 2 * hit / max(total + mask.sum(), _TINY),
        "kidney_overlap": _foreground_overlap(inside, channel),
        "tumor_elsewhere": elsewhere,
        "tumor_missed": 0.0 if mask.any() else elsewhere,
        "cyst": float(np.log10(1 + float(cyst.sum(dtype=np.float64)) * ml)),
    }
    return signs | ({AGREEMENT: agreement["tumor"]} if agreement else {})


def _foreground_overlap(inside: NDArray[np.uint8], channel: Mapping[str, NDArray[np.float16]]) -> float:
    mask = inside != BACKGROUND
    if "background" in channel:
        background = channel["background"]
        total = background.size - float(background.sum(dtype=np.float64))
        hit = mask.sum() - float(background[mask].sum(dtype=np.float64))
    else:
        whole = channel["foreground"] if "foreground" in channel else np.maximum(channel["kidney"], channel["tumor"])
        total, hit = float(whole.sum(dtype=np.float64)), float(whole[mask].sum(dtype=np.float64))
    return float(2 * hit / max(total + mask.sum(), _TINY))


def learn(
    signs: Sequence[Mapping[str, float]],
    dice: Array,
    qualities: Sequence[Quality],
    patients: Sequence[str],
    temperature: float | None = None,
) -> Confidence | None:
    """Fit the expected Dice, and compare orderings on the same cases; None for fewer than 19 cases or one patient.

    dice: of the tumor, (n,); qualities: by rules alone; patients: whose cases, kept together in ten folds.
    """
    if len(dice) < LEAST or len(set(patients)) < 2:
        return None
    names = sorted(set.intersection(*(set(one) for one in signs)))
    values = np.array([[one[name] for name in names] for one in signs])
    expected = _out_of_fold(values, dice, patients)
    constant, weights = _ridge(values, dice)
    doubtful = float(np.quantile(expected, REVIEWED))
    trust = {"fitted, out of fold": expected.clip(0, 1), "flags": np.array([_trust(quality) for quality in qualities])}
    if AGREEMENT in names:
        trust["ensemble Dice"] = values[:, names.index(AGREEMENT)]
    orderings = {name: order(dice, by) for name, by in {**trust, "best possible": dice}.items()}
    model = DiceModel(constant, dict(zip(names, map(float, weights), strict=True)), doubtful)
    failed, reviewed = int((dice < FAILED).sum()), round(REVIEWED * len(dice))
    return Confidence(reviewed, len(dice), failed, model, orderings, temperature)


def order(dice: Array, trust: Array) -> Ordering:
    """The risk-coverage curve of cases in the order of their trust, the highest first; ties by their expectation."""
    group = np.unique(-trust, return_inverse=True)[1]
    ranked = np.argsort(group, kind="stable")

    def sorted_means(values: Array) -> Array:
        return np.asarray((np.bincount(group, values) / np.bincount(group))[group][ranked], np.float64)

    curve = np.cumsum(sorted_means(1 - dice)) / np.arange(1, len(dice) + 1)
    least = sorted_means((dice < FAILED).astype(np.float64))[len(dice) - round(REVIEWED * len(dice)) :]
    return Ordering(float(curve.mean()), tuple(map(float, curve)), float(least.sum()))


def _trust(quality: Quality) -> float:
    """Green before amber before red, and fewer flags first, without the fitted one."""
    levels = [LEVELS.index(flag.level) for flag in quality.flags if flag.name != FLAG]
    return -float(100 * max(levels, default=0) + len(levels))


def _out_of_fold(values: Array, dice: Array, patients: Sequence[str]) -> Array:
    """The expected Dice of each case by a fit on other patients."""
    number = np.unique(np.array(patients), return_inverse=True)[1] % _FOLDS
    expected = np.empty(len(dice))
    for fold in np.unique(number):
        constant, weights = _ridge(values[number != fold], dice[number != fold])
        expected[number == fold] = constant + values[number == fold] @ weights
    return expected


def _ridge(values: Array, target: Array) -> tuple[float, Array]:
    """Ridge regression on standardized values; the constant, and the weights for the values as they are."""
    mean, spread = values.mean(axis=0), np.maximum(values.std(axis=0), _TINY)
    scaled = (values - mean) / spread
    weights = np.linalg.solve(scaled.T @ scaled + _PENALTY * np.eye(len(mean)), scaled.T @ target) / spread
    weights[values.std(axis=0) < _TINY] = 0
    return float(target.mean() - mean @ weights), weights


def sample(found: Probabilities, truth: NDArray[np.uint8]) -> list[tuple[NDArray[np.float32], NDArray[np.intp]]]:
    """Probabilities (n, K) and true classes (n,) of random voxels inside the box; independent channels one by one.

    truth: (D, H, W), the reference with kitseg's ids.
    """
    found = found.of_classes
    flat, inside = found.array.reshape(len(found.channels), -1), truth[found.box.slices].reshape(-1)
    if not flat.size:
        return []
    chosen = np.random.default_rng(_SEED).integers(flat.shape[1], size=min(_VOXELS, flat.shape[1]))
    rows, true = flat[:, chosen].T.astype(np.float32), inside[chosen]
    if "background" in found.channels:
        at = {name: place for place, name in enumerate(found.channels)}
        place = np.zeros(4, np.intp)
        for label, name in ((BACKGROUND, "background"), (KIDNEY, "kidney"), (TUMOR, "tumor"), (CYST, "cyst")):
            place[label] = at.get(name, at["kidney"])
        return [(rows, place[true])]
    means = {
        "foreground": true != BACKGROUND,
        "kidney": true != BACKGROUND,
        "tumor": true == TUMOR,
        "cyst": true == CYST,
    }
    return [
        (np.stack([1 - rows[:, n], rows[:, n]], axis=1), means[name].astype(np.intp))
        for n, name in enumerate(found.channels)
    ]


def fit_temperature(samples: Sequence[tuple[NDArray[np.float32], NDArray[np.intp]]]) -> float | None:
    """The temperature with the least mean negative log-likelihood (Guo et al., ICML 2017); None without samples."""
    if not samples:
        return None

    def loss(log_temperature: float) -> float:
        losses = [
            -np.log(np.maximum(soften(rows, float(np.exp(log_temperature)))[np.arange(len(true)), true], _TINY)).mean()
            for rows, true in samples
        ]
        return float(np.mean(losses))

    return float(np.exp(minimize_scalar(loss, bounds=(-2, 2), method="bounded").x))


def soften(probabilities: NDArray[Any], temperature: float) -> NDArray[np.float32]:
    """Probabilities (..., K) with their logarithms divided by a temperature, with a sum of 1."""
    powers = np.maximum(probabilities.astype(np.float32), np.float32(_TINY)) ** np.float32(1 / temperature)
    softened: NDArray[np.float32] = powers / powers.sum(axis=-1, keepdims=True)
    return softened


def uncertainty(found: Probabilities, temperature: float = 1.0) -> NDArray[np.uint8]:
    """The entropy of each voxel's calibrated probabilities in percent of its maximum, (D, H, W) of the whole scan.

    The most uncertain channel counts where channels are independent. Outside the probabilities' box it is 0.
    """
    found, percent = found.of_classes, np.zeros(found.geometry.shape, np.uint8)
    inside = percent[found.box.slices]
    for place, values in zip(inside, np.moveaxis(found.array, 1, 0), strict=True):
        rows = np.moveaxis(values, 0, -1)
        if "background" not in found.channels:
            rows = np.stack([1 - rows, rows], axis=-1)
        calm = soften(rows, temperature)
        entropy = -(calm * np.log(np.maximum(calm, _TINY))).sum(axis=-1) / np.log(calm.shape[-1])
        place[...] = np.rint(100 * (entropy if entropy.ndim == 2 else entropy.max(axis=-1)))
    return percent
