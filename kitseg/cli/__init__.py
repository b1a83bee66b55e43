"""The command line. Heavy modules are imported by the command that needs them, so that ``--help`` answers at once."""

from __future__ import annotations

from kitseg.cli import data, learn, bundle, predict, look, score  # isort: skip  # in the order of `kitseg --help`
from kitseg.cli.app import app, main

__all__ = ["app", "bundle", "data", "learn", "look", "main", "predict", "score"]
