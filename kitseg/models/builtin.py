"""The network that ships with kitseg, a model bundle beside this file, opened like any other; and when it is used."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from pathlib import Path

from kitseg import config
from kitseg.errors import InputError, KitsegError, UsageError
from kitseg.models.bundles.bundle import Bundle, open_bundle
from kitseg.models.run_folder import Run
from kitseg.volumes.names import BUNDLE

BUILTIN = "builtin"
FILE = Path(__file__).with_name(f"{BUILTIN}{BUNDLE}")


def open_builtin() -> Bundle:
    """The built-in network, unpacked into the cache; into a temporary folder where the cache can't be written.

    The temporary folder is removed when the process ends.

    Raises:
        InputError: the installation's file is damaged or missing.
    """
    try:
        return open_bundle(FILE)
    except InputError:
        raise
    except KitsegError:
        folder = Path(tempfile.mkdtemp(prefix="kitseg-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return open_bundle(FILE, cache=folder)


def choose_model(runs: Path) -> Path:
    """The only finished run that was trained on patients' scans; the built-in network where there is none.

    Phantoms and synthetic patients are no patients.

    Raises:
        UsageError: there are several, or none in an installation without the built-in network; or one needs --trust.
        InputError: a trained run is damaged. It is not passed over for another network.
    """
    folders = (path for path in sorted(runs.glob("*")) if not re.search(r"\.old-\d+$", path.name))
    finished = [run for run in map(Run, folders) if run.config.exists() and _is_finished(run)]
    real = [run for run in finished if not run.read_info().made_up]
    if len(real) > 1:
        raise UsageError("several runs are finished; pick one with --model: " + ", ".join(str(r.path) for r in real))
    if not (real or FILE.is_file()):
        raise UsageError(f"{runs} holds no run that learned from patients; train one, or name a model with --model")
    return real[0].path if real else open_builtin().path


def _is_finished(run: Run) -> bool:
    if not any(run.path.glob("fold_*/*/done.json")):  # another program may write a config.yaml, too
        return False
    last = list(config.method_of(config.read(run.config)).stages)[-1]
    return bool(run.folds(last))
