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

from kitseg import trust
from kitseg.errors import InputError, UsageError

GROUP = "kitseg.methods"


@dataclass(frozen=True)
class MethodFile:
    """The YAML file that describes a method.

    origin: ``kitseg``, a distribution's name or a folder; folder: the configuration folder; own: whether it is the
    user's, and may have Python modules beside it.
    """

    path: Path
    origin: str
    folder: Path
    own: bool = False

    @property
    def name(self) -> str:
        """The method's name on the command line."""
        return self.path.stem


def own_folder() -> Path:
    """The configuration folder that kitseg comes with."""
    return Path(str(resources.files("kitseg.conf")))


def find_method(method: str, config_dir: Path | None = None) -> MethodFile:
    """A method by its name, or by the path of its file, which contains a ``/`` or ends in ``.yaml``.

    Raises:
        UsageError: an unknown name, or one that several packages give. InputError: there is no such file.
    """
    if "/" in method or method.endswith((".yaml", ".yml")):
        return _by_path(Path(method))
    known = method_files(config_dir)
    found = [file for file in known if file.name == method]
    if not found:
        names = ", ".join(dict.fromkeys(file.name for file in known))
        raise UsageError(f"there is no method '{method}'; there are {names}, and --method takes a YAML file's path")
    if len(found) > 1 and not found[0].own:
        raise UsageError(f"'{method}' is a method of {' and of '.join(f.origin for f in found)}; give its file's path")
    return found[0]


def method_files(config_dir: Path | None = None) -> list[MethodFile]:
    """All methods that a name can mean; those of ``config_dir`` first, then kitseg's.

    Raises:
        InputError: ``config_dir`` has no methods. UsageError: a package's entry point can't be loaded.
    """
    own: list[MethodFile] = []
    if config_dir is not None:
        folder = config_dir.absolute()
        own = list(_in_folder(folder, str(config_dir), own=True))
        if not own:
            raise InputError(config_dir, "has no method/*.yaml", "Give a folder that is laid out like kitseg's conf.")
    return [*own, *_in_folder(own_folder(), "kitseg"), *_of_packages()]


def _in_folder(folder: Path, origin: str, own: bool = False) -> Iterator[MethodFile]:
    for path in sorted((folder / "method").glob("*.yaml")):
        yield MethodFile(path, origin, folder, own)


def _by_path(path: Path) -> MethodFile:
    if not path.is_file():
        raise InputError(path, "does not exist", "Give the path of a method's YAML file, or a method's name.")
    folder = path.absolute().parent
    folder = folder.parent if folder.name == "method" else folder
    return MethodFile(path.absolute(), str(path), folder, own=True)


def _of_packages() -> Iterator[MethodFile]:
    for point in metadata.entry_points(group=GROUP):
        origin = point.dist.name if point.dist else point.value
        try:
            folder = Path(str(resources.files(import_module(point.module))))
        except Exception as error:  # whatever a package raises when it is imported
            reason = f"{type(error).__name__}: {error}"
            raise UsageError(f"{origin}: its entry point {GROUP}: {point.name} can't be loaded ({reason})") from error
        yield from _in_folder(folder, origin)


def search(files: MethodFile, config_dir: Path | None) -> list[Path]:
    """The configuration folders to look into, in order; the user's are searched for Python modules from now on."""
    own = [files.folder] if files.own else []
    own += [] if config_dir is None or config_dir.absolute() in own else [config_dir.absolute()]
    for folder in own:
        trust.import_from(folder)
    given = [] if files.own else [files.folder]
    return list(dict.fromkeys([*own, *given, own_folder()]))
