"""What a model is, where it ran and what it learned from: in a line for the screen, and in records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kitseg.models.bundles.bundle import bundle_of
from kitseg.models.digests import run_digest
from kitseg.models.model import Model
from kitseg.volumes.names import BUNDLE

NONCOMMERCIAL = "-NC-"  # in the name of a Creative Commons license


def describe_model(model: Model) -> str:
    """The model in a line: folds, device, what trained it if not patients, what it can't find, a bundle's licenses."""
    learned = f"; trained on {what}" if (what := model.run.read_info().trained_on) else ""
    mirrored = "; each scan also mirrored" if model.mirror else ""
    folds = ", ".join(map(str, model.folds))
    where = f"{model.device} with {computed_with(model)}"
    name, licenses = str(model.run.path), ""
    if bundle := bundle_of(model.run):
        stated = ", ".join(f"{kind} {text}" for kind, text in bundle.manifest.licenses.items())
        use = "for non-commercial use; " if NONCOMMERCIAL in bundle.manifest.licenses["weights"] else ""
        name, licenses = str(bundle), f"; {use}licenses: {stated}"
    cysts = "; it has no class for cysts, which are kidney for it" if "cyst" not in model.outputs else ""
    return f"model: {name} ({model.method.name}, fold {folds}) on {where}{learned}{mirrored}{cysts}{licenses}"


def learned_from(models: Sequence[Model], *hashes: str) -> tuple[str, ...] | None:
    """The models whose networks learned from a scan, with their folds; None where that isn't known.

    hashes: of the scan's file and of its HU.
    """
    known = [model.learned_from(hashes) for model in models]
    found = tuple(
        f"{origin_path(model)}, fold {', '.join(map(str, folds))}"
        for model, folds in zip(models, known, strict=True)
        if folds
    )
    return None if None in known and not found else found


def origin_path(model: Model) -> str:
    """Where a model lies, or the name of its bundle."""
    bundle = bundle_of(model.run)
    return f"{bundle.manifest.name}{BUNDLE}" if bundle else str(model.run.path)


def computed_with(model: Model) -> str:
    """The engines that run a model's networks, and their precision."""
    return "; ".join(dict.fromkeys(str(stage.engine) for stage in model.chain.values()))


def origin(model: Model) -> dict[str, Any]:
    """The model of a result, and where it ran: all that two equal results must have in common."""
    info, source = model.run.read_info(), dict[str, Any](path=origin_path(model))
    if bundle := bundle_of(model.run):
        source["bundle"] = {"sha256": bundle.sha256, "licenses": bundle.manifest.licenses}
    return {
        **source,
        "folds": model.folds,
        "mirror": model.mirror,
        "device": model.device.type,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "engine": computed_with(model),
        "sha256": run_digest(model.run, model.folds, model.chain),
        "phantom": info.phantom,
        "trained_with": info.kitseg,
        **({"trained_on": info.trained_on} if info.trained_on else {}),
    }
