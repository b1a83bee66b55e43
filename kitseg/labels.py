"""Label schemes: the classes of label maps with their ids and names in files, and kitseg's own ids.

In memory and in preprocessed cases a label map has the ids below. A scheme states those of files; they are converted
where label maps are read and written, and nowhere else. Schemes that ship with kitseg are in ``conf/labels``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from msgspec import Meta, ValidationError, convert
from numpy.typing import NDArray

from kitseg.errors import InputError, UsageError
from kitseg.plain_files import read_json, read_yaml

BACKGROUND, KIDNEY, TUMOR, CYST = 0, 1, 2, 3
UNKNOWN = 255  # a value that the scheme of a label map doesn't have
CLASSES = {"kidney": KIDNEY, "tumor": TUMOR, "cyst": CYST}

_FOLDER = Path(str(resources.files("kitseg.conf"))) / "labels"
#: Other names of a class in nnU-Net's ``dataset.json``; in a region of several ids, ``mass`` is tumor and cyst.
_SYNONYMS = {"kidneys": "kidney", "tumour": "tumor", "tumors": "tumor", "tumours": "tumor", "cysts": "cyst"}
_SYNONYMS |= {"mass": "cyst", "masses": "cyst", "kidney_and_mass": "kidney", "kidney_and_masses": "kidney"}
_DATA_SET = "dataset.json"
_Class = Literal["kidney", "tumor", "cyst"]
_Line = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]{1,60}\Z")]


@dataclass(frozen=True)
class LabelClass:
    """A class. id: in label maps; name: in reports and DICOM segmentations; colour: ``#rrggbb``."""

    id: Annotated[int, Meta(ge=1, lt=UNKNOWN)]
    name: _Line
    colour: Annotated[str, Meta(pattern=r"^#[0-9a-fA-F]{6}\Z")]


@dataclass(frozen=True)
class Scheme:
    """A label scheme. cyst: None if cysts are labelled as kidney; regions: scored unions of classes, by name."""

    name: _Line
    kidney: LabelClass
    tumor: LabelClass
    cyst: LabelClass | None = None
    regions: dict[_Line, tuple[_Class, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what in ("id", "name"):
            values = [getattr(label, what) for label in self.classes.values()]
            if len(set(values)) < len(values):
                raise ValueError(f"two classes have the same {what}: {', '.join(map(str, values))}")
        if odd := sorted({name for region in self.regions.values() for name in region} - self.classes.keys()):
            raise ValueError(f"its regions name {', '.join(odd)}, which is not a class of it")

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{label.id} {label.name}' for label in self.classes.values())})"

    @property
    def classes(self) -> dict[str, LabelClass]:
        """The classes by kitseg's name, in the order of kitseg's ids."""
        return {name: label for name in CLASSES if (label := getattr(self, name)) is not None}

    @property
    def ids(self) -> dict[str, int]:
        """The id in files of each class."""
        return {name: label.id for name, label in self.classes.items()}

    @property
    def names(self) -> dict[str, str]:
        """The name of each class in reports."""
        return {name: label.name for name, label in self.classes.items()}

    @property
    def colours(self) -> dict[str, str]:
        """The colour of each class, ``#rrggbb``."""
        return {name: label.colour for name, label in self.classes.items()}

    @property
    def line(self) -> str:
        """The ids as a line that ``find_scheme`` takes."""
        return ",".join(f"{name}={number}" for name, number in self.ids.items())

    @property
    def from_file(self) -> NDArray[np.uint8]:
        """(256,) kitseg's id of each id in a file; ``UNKNOWN`` for ids that the scheme doesn't have."""
        table = np.full(256, UNKNOWN, np.uint8)
        table[[BACKGROUND, *self.ids.values()]] = [BACKGROUND, *(CLASSES[name] for name in self.ids)]
        return table

    @property
    def to_file(self) -> NDArray[np.uint8]:
        """(256,) the id in files of each of kitseg's; cysts are kidney in a scheme without them."""
        table = np.arange(256, dtype=np.uint8)
        table[list(CLASSES.values())] = [self.ids.get(name, self.kidney.id) for name in CLASSES]
        return table

    def is_read_by(self, other: Scheme) -> bool:
        """Whether another scheme gives all of its ids the same classes."""
        return self.ids.items() <= other.ids.items()

    def contradicts(self, other: Scheme) -> bool:
        """Whether an id is one class here and another class there."""
        here, there = {number: name for name, number in self.ids.items()}, other.ids
        return any(here.get(number, name) != name for name, number in there.items())

    def plain(self) -> dict[str, Any]:
        """The scheme as plain values, which ``scheme_of`` takes."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class _Dataset:
    """nnU-Net's ``dataset.json``."""

    labels: dict[str, int | list[int]] = field(default_factory=dict)
    regions_class_order: list[int] = field(default_factory=list)


def scheme_of(plain: Any) -> Scheme:
    """The scheme of plain values: the name of one that ships with kitseg, or the content of a scheme's file.

    Only kidney and tumor with their ids have to be stated. Raises ValueError: values that don't describe a scheme.
    """
    if isinstance(plain, str):
        if plain not in built_in_names():
            raise ValueError(f"there is no label scheme '{plain}'")
        return convert(yaml.safe_load((_FOLDER / f"{plain}.yaml").read_text("utf-8")), Scheme)
    if not isinstance(plain, Mapping):
        raise ValueError("it is not a mapping")
    if odd := [key for key in plain if key not in {*CLASSES, "name", "regions"}]:
        raise ValueError(f"'{odd[0]}' is not among {', '.join(CLASSES)}, the classes that kitseg has, each with one id")
    if missing := [key for key in ("kidney", "tumor") if plain.get(key) is None]:
        raise ValueError(f"it lacks {' and '.join(missing)}")
    usual = scheme_of("kits23" if plain.get("cyst") is not None else "kits19").plain()
    full = {**usual, "name": "own", **plain}
    for name in CLASSES:
        if isinstance(given := plain.get(name), int | Mapping):
            full[name] = {**usual[name], "id": None, **({"id": given} if isinstance(given, int) else given)}
    try:
        return convert(full, Scheme)
    except ValidationError as error:
        raise ValueError(str(error).replace("`", "").replace("$.", "")) from error


def built_in_names() -> list[str]:
    """The schemes that ship with kitseg."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def find_scheme(text: str | Scheme) -> Scheme:
    """The scheme that a user names: kits23, ``kidney=1,tumor=2,cyst=3``, a YAML file, or nnU-Net's ``dataset.json``.

    Also its plain values as JSON, which kitseg passes on.

    Raises:
        UsageError: none of these. InputError: a file that doesn't describe a scheme.
    """
    if isinstance(text, Scheme):
        return text
    path = Path(text)
    if text in built_in_names():
        return scheme_of(text)
    if text.startswith("{"):
        try:
            return scheme_of(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"--labels {text}: {error}") from error
    if path.suffix not in (".yaml", ".yml", ".json"):
        known = f"{' or '.join(built_in_names())}, kidney=1,tumor=2,cyst=3, a .yaml file, or nnU-Net's dataset.json"
        if path.is_dir():
            raise UsageError(
                f"--labels {text} is a folder; it takes {known}. Give folders of label maps with --data or --masks"
            )
        pairs = [part.partition("=")[::2] for part in text.split(",")]
        if "=" not in text or not all(number.strip().isdecimal() for _, number in pairs):
            raise UsageError(f"unknown labels '{text}': give {known}")
        try:
            if len(ids := {name.strip(): int(number) for name, number in pairs}) < len(pairs):
                raise ValueError("a class has two ids; kitseg takes one")
            return scheme_of({"name": text, **ids})
        except ValueError as error:
            raise UsageError(f"--labels {text}: {error}") from error
    try:
        plain = _from_nnunet(read_json(path, _Dataset).labels) if path.suffix == ".json" else read_yaml(path)
        return scheme_of({"name": path.stem, **plain} if isinstance(plain, dict) else plain)
    except (OSError, ValueError) as error:
        problem = f"can't be used as a label scheme ({' '.join(str(error).split())})"
        raise InputError(path, problem, "See docs/how-to/labels.md.") from error


def predictions_scheme(labels: Path) -> Scheme | None:
    """The scheme of nnU-Net's predictions, by the ``dataset.json`` in their folder; None where none describes one.

    Raises:
        InputError: its ``regions_class_order`` gives predictions other ids than label maps have.
    """
    if (known := _data_set(labels)) is None:
        return None
    path, scheme, written = known
    if path.parent == labels.absolute().parent and written and written != scheme.ids:
        ids = ",".join(f"{name}={number}" for name, number in written.items())
        problem = f"its regions_class_order writes predictions with {ids}, while label maps have {scheme.line}"
        raise InputError(path, problem, f"Move it elsewhere, and give --labels {ids} for these predictions alone")
    return scheme


def check_data_set(labels: Path, scheme: Scheme) -> None:
    """Make sure that a label map of nnU-Net's is not read against its ``dataset.json``.

    Raises:
        InputError: an id is another class there.
    """
    if (known := _data_set(labels)) and known[1].contradicts(scheme):
        problem = f"{known[0]} states {known[1].line} for it, and it would be read as {scheme.line}"
        raise InputError(labels, problem, f"Give --labels {known[0]}")


def data_set_places(labels: Path) -> list[Path]:
    """Where nnU-Net's ``dataset.json`` of a label map may be: in its folder, or that of its data set."""
    folder = labels.absolute().parent
    data_set = [folder.parent] if folder.name in ("labelsTr", "labelsTs") else []
    return [place / _DATA_SET for place in (folder, *data_set)]


def _data_set(labels: Path) -> tuple[Path, Scheme, dict[str, int]] | None:
    """nnU-Net's ``dataset.json`` of a label map's folder or data set, and what ``_stated`` finds in it."""
    for path in data_set_places(labels):
        if path.is_file() and (stated := _stated(path, path.stat().st_mtime_ns)):
            return path, *stated
    return None


@cache
def _stated(path: Path, _changed: int) -> tuple[Scheme, dict[str, int]] | None:
    """The scheme of a ``dataset.json``, and the ids that predictions of regions get; None where it describes none."""
    with suppress(InputError):
        scheme, content = find_scheme(str(path)), read_json(path, _Dataset)
        names = [name.lower() for name, value in content.labels.items() if value != BACKGROUND]
        roles = (_SYNONYMS.get(name, name) for name in names)
        return scheme, dict(zip(roles, content.regions_class_order, strict=False))
    return None


def widest(schemes: Sequence[Scheme]) -> Scheme:
    """The first of several schemes that has cysts, else the first."""
    return next((scheme for scheme in schemes if scheme.cyst), schemes[0])


def to_kits19(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A label map (any shape) whose cysts are kidney."""
    return np.where(labels == CYST, np.uint8(KIDNEY), labels)


def _from_nnunet(stated: Mapping[str, int | list[int]]) -> dict[str, Any]:
    """The scheme of nnU-Net's ``dataset.json``; of nested regions, such as kidney [1, 2, 3], the smallest counts."""
    found: dict[int, tuple[str, str]] = {}
    plain: dict[str, Any] = {}
    for name, value in sorted(stated.items(), key=lambda item: -np.size(item[1])):
        role = _SYNONYMS.get(name.lower(), name.lower())
        shown = role if isinstance(value, list) else name
        found |= dict.fromkeys(value if isinstance(value, list) else [value], (role, shown))
    for number, (role, name) in found.items():
        if number != BACKGROUND and role in plain:
            raise ValueError(f"{role} has the ids {plain[role]['id']} and {number}; kitseg takes one")
        plain |= {} if number == BACKGROUND else {role: {"id": number, "name": name}}
    return plain


#: The schemes of the challenges; in KiTS19's, cysts are kidney.
KITS19, KITS23 = scheme_of("kits19"), scheme_of("kits23")
