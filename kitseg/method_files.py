"""Where methods are described: in kitseg's configuration folder, in those of installed packages, and in the user's.

A configuration folder is laid out like ``conf``: a YAML file for each method in ``method``, and what these files name,
such as ``stage/NAME.yaml``. A package gives one as an entry point of the group ``kitseg.methods``, whose value is the
Python package that the folder is. A file or folder of the user's may hold the Python modules that it names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata, resources
from pathlib import Path

from kitseg.errors import InputError, UsageError

GROUP = "kitseg.methods"
BUILT_IN = Path(str(resources.files("kitseg.conf")))


@dataclass(frozen=True)
class MethodFile:
    """The YAML file that describes a method.

    origin: ``kitseg``, a distribution's name, or the path that the user gave; own: the user's folders, which may hold
    Python modules; folders: all configuration folders to look into, in order.
    """

    path: Path
    origin: str
    own: tuple[Path, ...]
    folders: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The method's name on the command line."""
        return self.path.stem


def find_method(method: str, config_dir: Path | None = None) -> MethodFile:
    """A method by its name, or by the path of its file, which contains a ``/`` or ends in ``.yaml``.

    Raises:
        UsageError: an unknown name, or one that several packages give. InputError: there is no such file.
    """
    if "/" in method or method.endswith((".yaml", ".yml")):
        path = Path(method).absolute()
        if not path.is_file():
            raise InputError(method, "does not exist", "Give the path of a method's YAML file, or a method's name.")
        folder = path.parent.parent if path.parent.name == "method" else path.parent
        own = tuple(dict.fromkeys([folder, *([config_dir.absolute()] if config_dir else [])]))
        return MethodFile(path, method, own, (*own, BUILT_IN))
    known = method_files(config_dir)
    found = [file for file in known if file.name == method]
    if not found:
        names = ", ".join(dict.fromkeys(file.name for file in known))
        raise UsageError(f"unknown method '{method}'. Choose from {names}, or give the path of a .yaml file")
    if len(found) > 1 and found[0].origin != str(config_dir):
        raise UsageError(f"'{method}' is a method of {' and of '.join(f.origin for f in found)}; give its file's path")
    return found[0]


def method_files(config_dir: Path | None = None) -> list[MethodFile]:
    """All methods that a name can mean; those of ``config_dir`` first, then kitseg's.

    Raises:
        InputError: ``config_dir`` has no methods. UsageError: a package's entry point can't be loaded.
    """
    own = () if config_dir is None else (config_dir.absolute(),)
    folders = [*((str(config_dir), folder) for folder in own), ("kitseg", BUILT_IN), *_packages()]
    found = [
        MethodFile(path, origin, own, tuple(dict.fromkeys([*own, folder, BUILT_IN])))
        for origin, folder in folders
        for path in sorted((folder / "method").glob("*.yaml"))
    ]
    if config_dir is not None and found[0].origin != str(config_dir):
        raise InputError(config_dir, "has no method/*.yaml", "Give a folder that is laid out like kitseg's conf.")
    return found


def _packages() -> Iterator[tuple[str, Path]]:
    """The configuration folders of installed packages, each with the name of its distribution."""
    for point in metadata.entry_points(group=GROUP):
        origin = point.dist.name if point.dist else point.value
        try:
            folder = Path(str(resources.files(import_module(point.module))))
        except Exception as error:  # whatever a package raises when it is imported
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(f"{origin}: its entry point {GROUP}: {point.name} can't be loaded ({reason})") from error
        yield origin, folder
