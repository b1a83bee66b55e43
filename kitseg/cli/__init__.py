"""The command line. Each command imports its heavy modules when it runs, so that ``--help`` stays fast."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer.models import OptionInfo

from kitseg.cli import augment, bundle, data, learn, look, plan, predict, score, serve
from kitseg.cli.app import app, main

__all__ = ["app", "augment", "bundle", "data", "learn", "look", "main", "plan", "predict", "score", "serve"]

#: The panels of ``kitseg --help``, in the order of the work.
PANELS = {
    "Data": ("download", "phantom", "synthesize", "check", "split", "preprocess", "augment", "fit-priors"),
    "Training": ("plan", "train", "validate", "compare", "choose"),
    "Prediction": ("predict", "infer", "ensemble", "postprocess", "grand-challenge"),
    "Results": ("evaluate", "measure", "followup", "report", "refine", "mesh", "submit"),
    "Sharing": ("export", "serve"),
    "About": ("methods", "demo"),
}


def _name_value(hint: Any) -> None:
    """Show the kind of an option's value without Python's types: nothing for a flag, <path> for a list of paths."""
    kind, *infos = get_args(hint) if get_origin(hint) is Annotated else [hint]
    for info in infos:
        if isinstance(info, OptionInfo) and info.metavar is None and (kind is bool or get_origin(kind) is list):
            info.metavar = "" if kind is bool else f"<{get_args(kind)[0].__name__.lower()}>"


def _group_commands() -> None:
    """Sort the commands into their panels, and let the terminal wrap the paragraphs of their help."""
    commands = {info.callback.__name__.replace("_", "-"): info for info in app.registered_commands if info.callback}
    panels = {name: panel for panel, names in PANELS.items() for name in names}
    for name, info in commands.items():
        info.rich_help_panel = panels[name]
        paragraphs = (inspect.getdoc(info.callback) or "").split("\n\n")
        hints = info.callback.__annotations__ = get_type_hints(info.callback, include_extras=True)
        for hint in hints.values():
            _name_value(hint)
        info.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.registered_commands = [commands[name] for name in panels]


_group_commands()
