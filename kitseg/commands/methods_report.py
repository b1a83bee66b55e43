"""What a publication states about a run: a methods paragraph and the items of CLAIM, from the run's own files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kitseg import config
from kitseg.commands.confidence import read_confidence
from kitseg.commands.metric_choices import metric_choices
from kitseg.commands.score_files import ScoreFile, read_scores
from kitseg.errors import InputError, UsageError
from kitseg.models.run_folder import TRAINED_STATE, Run, RunInfo
from kitseg.report.html import write_page
from kitseg.report.scores import as_background, not_scored
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.scoring.protocols import METRICS
from kitseg.splits import Split, read_split
from kitseg.volumes import blocks

T = TypeVar("T")
PAGE, UNKNOWN = "methods.html", "not recorded"
_WORST = 5
_ENSEMBLING = "Probabilities are averaged over a fold's checkpoints and, for new scans, over the folds."
_UNCERTAINTY = "95 % confidence intervals of means: BCa bootstrap (9999 resamples) over patients, from six on."
#: What a training loop of a stage is, from its configuration: words and keys.
_TRAINING = (("batch of {}", "batch"), ("{} epochs", "epochs"), ("precision {}", "precision"))


@dataclass(frozen=True)
class RunFacts:
    """The files of a run, None where one is missing: an exported model has no split and no scores.

    stages: their configurations in order; versions: of the libraries that validated it; epochs: of each finished
    training, by stage and fold; initial: the stages that started from the weights of another model.
    """

    run: Run
    configuration: Mapping[str, Any]
    stages: Mapping[str, Mapping[str, Any]]
    info: RunInfo | None
    split: Split | None
    scores: ScoreFile | None
    versions: Mapping[str, str]
    epochs: Mapping[str, Sequence[int | None]]
    initial: Sequence[str]


def write_methods(path: Path, to: Path) -> Path:
    """Write the page of a run into a folder; its path.

    Raises InputError: the run's configuration or its confidence.json can't be read; UsageError: a file that kitseg
    didn't write in the way.
    """
    page = to / PAGE
    refuse_overwrite(page, "html")
    facts = read_facts(Run(path))
    choices = metric_choices(facts.scores, UNKNOWN)
    content = {
        "paragraph": _paragraph(facts),
        "items": _items(facts),
        "choices": choices,
        "unknown": UNKNOWN,
        "facts": {},
    }
    confidence = None
    with suppress(UsageError):
        confidence = read_confidence(path)
    write_page(page, "methods.html.j2", title=f"Methods of {path.name}", confidence=confidence, **content)
    return page


def read_facts(run: Run) -> RunFacts:
    """Read a run's files. Raises InputError: its configuration is missing or damaged."""
    configuration = config.read(run.config)
    stages = {name: configuration["stages"][name] for name in config.method_of(configuration).stages}
    info, split, scores, versions = None, None, None, {}
    with suppress(InputError):
        info = run.read_info()
    with suppress(InputError):
        split = read_split(run.split)
    with suppress(InputError):
        scores = read_scores(run.scores(False))
    with suppress(InputError):
        manifest = next(iter(sorted(run.path.glob("fold_*/validation/manifest.json"))), run.path)
        versions = dict(blocks.read_manifest(manifest.parent)["versions"])
    epochs = {
        name: [TRAINED_STATE.read(run.stage(fold, name).done).epochs for fold in run.folds(name)] for name in stages
    }
    loaded = [path.relative_to(run.path).parts[1] for path in run.beginnings()]
    initial = [name for name in stages if name in loaded]
    return RunFacts(run, configuration, stages, info, split, scores, versions, epochs, initial)


def _paragraph(facts: RunFacts) -> str:
    """The methods in sentences, only of what the files state."""
    cases = len(facts.info.cases) if facts.info and facts.info.cases else None
    sentences = [
        f"Kidneys and their lesions were segmented in CT with kitseg ({_version(facts)}), method "
        f"{facts.configuration['name']} ({facts.configuration['paper']}): {_networks(facts)}.",
        f"{_data(facts)} {_partitions(facts)}" if cases else "",
        f"{_preprocessing(facts)}",
        f"{_training(facts)} {_selection(facts)}",
        _post_processing(facts),
        f"{_performance(facts.scores)} {_UNCERTAINTY}" if facts.scores else "",
    ]
    return " ".join(sentence.strip() for sentence in sentences if sentence and UNKNOWN not in sentence)


def _items(facts: RunFacts) -> list[tuple[int, str, str]]:
    """The items of CLAIM (Mongan, Moy and Kahn, Radiology: Artificial Intelligence 2020), and what is known of each.

    Those about data, reference, model, training, evaluation and results.
    """
    return [
        (5, "Prospective or retrospective", UNKNOWN),
        (7, "Data sources", _data(facts)),
        (8, "Eligibility criteria", UNKNOWN),
        (9, "Data preprocessing", _preprocessing(facts)),
        (11, "Data elements", f"Labels: {config.method_of(facts.configuration).labels}."),
        (12, "De-identification", UNKNOWN),
        (13, "Missing data", _from(facts.scores, _missing)),
        (14, "Reference standard", "The label maps of the cases; how they were drawn: not recorded."),
        (16, "Annotators and their qualification", UNKNOWN),
        (17, "Annotation tools", UNKNOWN),
        (18, "Variability between and within readers", UNKNOWN),
        (19, "Sample size, how it was determined", UNKNOWN),
        (20, "Assignment of data to partitions", _partitions(facts)),
        (21, "Level at which partitions are disjoint", _from(facts.split, _disjoint)),
        (22, "Model", f"{_networks(facts)}. All settings: config.yaml of the run."),
        (23, "Software and versions", _software(facts)),
        (24, "Initialization", _initialization(facts)),
        (25, "Training", _training(facts)),
        (26, "Selection of the final model", _selection(facts)),
        (27, "Ensembling", _ENSEMBLING),
        (28, "Metrics", _from(facts.scores, _metrics)),
        (29, "Uncertainty and significance", _from(facts.scores, lambda _: _UNCERTAINTY)),
        (30, "Robustness", _strata(facts)),
        (31, "Explainability", UNKNOWN),
        (32, "External data", UNKNOWN),
        (33, "Flow of cases", _from(facts.scores, _flow)),
        (34, "Demographic and clinical characteristics", UNKNOWN),
        (35, "Performance", _from(facts.scores, _performance)),
        (37, "Failures", _from(facts.scores, _failures)),
    ]


def _from(file: T | None, text: Callable[[T], str]) -> str:
    """A text from one of the run's files, if it is there."""
    return UNKNOWN if file is None else text(file)


def _version(facts: RunFacts) -> str:
    return f"version {facts.info.kitseg}" if facts.info else "version not recorded"


def _networks(facts: RunFacts) -> str:
    stages = []
    for name, stage in facts.stages.items():
        guided = f", with the output of {' and '.join(stage['inputs'])}" if stage.get("inputs") else ""
        stages.append(f"{_class(stage['module']['net'])} ({name}{guided})")
    return "networks in order: " + ", ".join(stages)


def _data(facts: RunFacts) -> str:
    if not (facts.info and facts.info.cases):
        return UNKNOWN
    made = facts.configuration.get("data", {}).get("source") == "synthesis"
    kind = f" {('' if made and not facts.info.phantom else facts.info.made_up) or 'labelled CT scans'}"
    more = "; training patches show synthetic patients made from them" if made else ""
    more += f"; it also learned from {' and '.join(facts.info.also)}" if facts.info.also else ""
    seen = facts.info.experience
    ranges = f"; slices {_span(seen.slice_mm)} mm apart, pixels of {_span(seen.pixel_mm)} mm" if seen else ""
    return f"{len(facts.info.cases)}{kind}{more}{ranges}."


def _partitions(facts: RunFacts) -> str:
    if facts.split is None:
        return UNKNOWN
    folds = facts.split.folds
    train, val = ([len(getattr(fold, part)) for fold in folds] for part in ("train", "val"))
    trained = len(facts.run.folds(list(facts.stages)[-1]))
    text = f"{len(folds)} folds: {_span(train)} cases for training and {_span(val)} for validation in each"
    test = f", {len(facts.split.test)} cases held out for testing" if facts.split.test else ", no test set"
    how = f"`kitseg split` draws at random, balanced by tumor volume and slice distance (seed {facts.split.seed})"
    return f"{text}{test}, as listed in splits.json; {how}. {trained} of the folds are trained."


def _disjoint(split: Split) -> str:
    stated = len(split.patients)
    return f"Patient: a case is a patient of its own, unless patients are stated (of {stated} cases); kitseg checks it."


def _preprocessing(facts: RunFacts) -> str:
    parts = []
    for name, stage in facts.stages.items():
        grid = ", ".join(f"{key} {value}" for key, value in stage["grid"].items())
        parts.append(f"{name}: resampled to {grid or 'the scan itself'}; intensity {_settings(stage['intensity'])}")
    return f"{'; '.join(parts)}."


def _missing(scores: ScoreFile) -> str:
    return f"A case without a usable prediction is scored as background: {len(as_background(scores))} cases."


def _software(facts: RunFacts) -> str:
    known = [f"{name} {version}" for name, version in facts.versions.items()]
    return f"Trained with kitseg {_version(facts)}; validated with {', '.join(known) or UNKNOWN}."


def _initialization(facts: RunFacts) -> str:
    fresh = [name for name in facts.stages if name not in facts.initial]
    parts = [f"random weights (seed {facts.configuration['seed']}): {', '.join(fresh)}"] if fresh else []
    parts += [f"weights of another model (initial.json): {', '.join(facts.initial)}"] if facts.initial else []
    return f"Networks start from {'; from '.join(parts)}."


def _training(facts: RunFacts) -> str:
    parts = []
    for name, stage in facts.stages.items():
        module = stage["module"]
        words = [text.format(stage[key]) for text, key in _TRAINING if stage.get(key) is not None]
        losses = f"loss {_class(module['loss'])}" if "loss" in module else f"loss of {_class(module)}"
        optimizer = f"{_settings(module['optimizer'])}" if "optimizer" in module else "optimizer of the stage"
        done = [count for count in facts.epochs[name] if count]
        trained = f"trained for {_span(done)} epochs" if done else "epochs trained: not recorded"
        parts.append(f"{name}: {losses}, {optimizer}, {', '.join(words)}; {trained}")
    return f"{'; '.join(parts)}."


def _selection(facts: RunFacts) -> str:
    count = facts.configuration.get("keep_best", UNKNOWN)
    return f"The best checkpoints by the score on the fold's validation cases were kept ({count} at most)."


def _post_processing(facts: RunFacts) -> str:
    steps = [_settings(step) for step in facts.configuration["postprocess"].values()]
    return f"Post-processing: {'; '.join(steps)}." if steps else "There was no post-processing."


def _metrics(scores: ScoreFile) -> str:
    keys = dict.fromkeys(key for figures in scores["mean"].values() for key in figures)
    names = ", ".join(METRICS.get(key, key) for key in keys)
    return f"{names} by the rules of {scores['protocol']}, of {', '.join(scores['mean'])}."


def _strata(facts: RunFacts) -> str:
    rows = [row for row in (facts.scores["groups"] if facts.scores else []) if row["kind"] not in ("all", "fold")]
    shown = [f"{row['kind']} {row['name']} ({row['cases']}): {_named(row['dice'])}" for row in rows]
    return f"Mean Dice by group: {'; '.join(shown)}." if shown else UNKNOWN


def _flow(scores: ScoreFile) -> str:
    empty, failed = len(as_background(scores)), len(not_scored(scores))
    return f"{len(scores['cases'])} cases scored out of fold, {empty} of them as background; {failed} not scored."


def _performance(scores: ScoreFile) -> str:
    parts = []
    for name, figures in scores["mean"].items():
        interval = scores.get("ci95", {}).get(name, {}).get("dice")
        text = "undefined" if (mean := figures["dice"]) is None else f"{mean:.3f}"
        parts.append(f"{name} {text}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""))
    cases = f"{len(scores['cases'])} cases ({len(as_background(scores))} as background, without a usable prediction)"
    selected = "These cases selected the checkpoints, which makes the figures optimistic."
    return f"Mean Dice of out-of-fold predictions of {cases}: {', '.join(parts)}. {selected}"


def _failures(scores: ScoreFile) -> str:
    dice = {case: found["tumor"]["dice"] for case, found in scores["cases"].items() if "tumor" in found}
    worst = sorted((value, case) for case, value in dice.items() if value is not None)[:_WORST]
    listed = ", ".join(f"{case} {value:.3f}" for value, case in worst)
    below = sum(value is not None and value < 0.5 for value in dice.values())
    return f"Tumor Dice below 0.5 in {below} of {len(dice)} cases; lowest: {listed}." if worst else UNKNOWN


def _named(dice: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in dice.items()) or "undefined"


def _class(spec: Mapping[str, Any]) -> str:
    return str(spec.get("_target_", UNKNOWN)).rpartition(".")[2]


def _settings(spec: Mapping[str, Any]) -> str:
    """A part by its class and its plain settings."""
    plain = {k: v for k, v in spec.items() if not k.startswith("_") and not isinstance(v, Mapping) and v is not None}
    listed = ", ".join(f"{key} {value}" for key, value in plain.items())
    return f"{_class(spec)} ({listed})" if listed else _class(spec)


def _span(values: Sequence[float] | None) -> str:
    """The lowest and the highest value, or both where they are one."""
    if not values:
        return UNKNOWN
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
