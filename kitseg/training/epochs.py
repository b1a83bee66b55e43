"""More epochs for a run that exists: the only change of its configuration that a run accepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kitseg import __version__, config
from kitseg.config import Config, StageSpec
from kitseg.models.run_folder import SCHEMA, TRAINED_STATE, Run, StageFolder, TrainedState
from kitseg.runtime.provenance import FileFormat


@dataclass(frozen=True)
class _Raises:
    raised: list[dict[str, Any]]


_RAISES = FileFormat(_Raises, SCHEMA)


def only_more_epochs(old: Config, new: Config) -> bool:
    """Whether two configurations differ in nothing but more epochs of stages that aren't trained in rounds."""
    if config.differences(_with_epochs_of(old, new), new):
        return False
    pairs = [(old["stages"][name], new["stages"][name]) for name in new["chain"]]
    return all(
        after["epochs"] == before["epochs"] or (after["epochs"] > before["epochs"] and not after.get("rounds"))
        for before, after in pairs
    )


def record_raise(run: Run, old: Config, new: Config) -> None:
    """Append the epochs before and after to the run's ``epochs.json``."""
    rows = _raises(run)
    row = {"kitseg": __version__, "from": _epochs(old), "to": _epochs(new)}
    _RAISES.write(run.path / "epochs.json", {"raised": [*rows, row]})


def missing_epochs(run: Run, spec: StageSpec, folder: StageFolder) -> int:
    """How many of its epochs a finished training lacks since they were raised; none where it stopped early.

    A training that an earlier version of kitseg finished had as many as the run's first configuration states.
    """
    rows = _raises(run)
    if spec.rounds is not None or not rows:
        return 0
    state: TrainedState = TRAINED_STATE.read(folder.done)
    done = rows[0]["from"][spec.name] if state.epochs is None else state.epochs
    return 0 if state.stopped else max(0, spec.epochs - done)


def _raises(run: Run) -> list[dict[str, Any]]:
    path = run.path / "epochs.json"
    return _RAISES.read(path).raised if path.exists() else []


def _epochs(configuration: Config) -> dict[str, int]:
    return {name: configuration["stages"][name]["epochs"] for name in configuration["chain"]}


def _with_epochs_of(old: Config, new: Config) -> Config:
    """A configuration with the epochs of another, also where a schedule's setting is their number."""
    stages = {}
    for name, stage in old["stages"].items():
        later = new["stages"].get(name, {})
        module, schedule = stage["module"], stage["module"].get("scheduler") or {}
        now = (later.get("module", {}).get("scheduler") or {}).items()
        ends = {key: value for key, value in now if (schedule.get(key), value) == (stage["epochs"], later["epochs"])}
        module = {**module, "scheduler": {**schedule, **ends}} if schedule else module
        stages[name] = {**stage, "epochs": later.get("epochs"), "module": module}
    return {**old, "stages": stages}
