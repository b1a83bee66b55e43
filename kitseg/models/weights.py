"""Trained weights on disk: Lightning's checkpoints and safetensors. Nothing in either is ever executed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from zipfile import ZipFile, is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from kitseg.errors import InputError, fault
from kitseg.models.bundles.archive import SAFE, BoundedReads
from kitseg.models.run_folder import LARGEST, StageFolder
from kitseg.runtime.files import file_digest
from kitseg.stages.model import StageModel

KINDS, LARGEST_HEAD = {torch.float32: "F32", torch.int64: "I64"}, 1 << 20  # of a safetensors file; bytes
FULL = {"F16": "F32"}  # the weights of a network may be stored in half precision
_REMEDY = "Restore it, or train again with --restart."


@dataclass(frozen=True)
class Checkpoint:
    """The weights in a file, and the model that they belong to.

    once: whether its network has one pass with them, so that an engine needn't keep anything for a second one.
    """

    name: Path
    model: StageModel
    once: bool = False

    def load(self) -> StageModel:
        """The model with these weights, loaded unless they are there already; nothing in the file is executed.

        Raises:
            InputError: damaged, or of another network.
        """
        if self.model.loaded == self.name:
            return self.model
        if self.model.device.type == "meta":
            allocate(self.model, torch.device("cpu"))
        try:
            self.model.load_state_dict(read_weights(self.name, self.model.device))
        except RuntimeError as error:
            raise InputError(self.name, f"can't be loaded ({_reason(error)})", _REMEDY) from error
        self.model.loaded = self.name
        return self.model

    def drop(self) -> None:
        """Keep the network's structure only."""
        self.model.drop_weights()


def allocate(model: StageModel, device: torch.device) -> None:
    """Give a model on the meta device weights without values on another device."""
    state = {
        name: torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
        for name, value in model.state_dict().items()  # Module.to_empty would import sympy, which takes half a second
    }
    model.load_state_dict(state, assign=True)


def sound_checkpoints(folder: StageFolder) -> tuple[Path, ...]:
    """A finished training's best checkpoints, best first, each as it was written.

    Raises:
        InputError: one has changed; see ``StageFolder.checkpoints``.
    """
    rows = folder.checkpoints()
    for path, digest in rows:
        facts = path.stat()
        if _digest(path, facts.st_size, facts.st_mtime_ns) != digest:
            raise InputError(path, "has changed or is damaged", _REMEDY)
    return tuple(path for path, _ in rows)


@cache
def _digest(path: Path, size: int, written: int) -> str:
    """A file's hash, which is computed once as long as the file stays as it is."""
    return file_digest(path)


def read_weights(path: Path, device: torch.device, key: str = "state_dict") -> dict[str, Tensor]:
    """The weights of a checkpoint's network by the names that they have in a ``StageModel``, on a device.

    key: where a checkpoint has them. Lightning's have them below ``model.``, those of kitseg 0.1 as they are; a loss's
    own are left out.

    Raises:
        InputError: damaged, or with anything but weights in it.
    """
    try:
        if path.suffix == SAFE:
            return load_file(path, device=str(device))
        _check_size(path)
        state = torch.load(path, map_location=device, weights_only=True, mmap=True)[key]
    except UnpicklingError as error:
        problem = "holds more than weights or is damaged; nothing in it was run"
        raise InputError(path, problem, _REMEDY) from error
    except Exception as error:  # a damaged file can make its reader raise anything
        if fault(error):
            raise
        raise InputError(path, f"can't be loaded ({_reason(error)})", _REMEDY) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(path, "doesn't hold weights", _REMEDY)
    if sum(value.nbytes for value in state.values()) > path.stat().st_size:
        raise InputError(path, "claims more values than it has", _REMEDY)  # by strides of 0
    return {name.removeprefix("model."): value for name, value in state.items() if not name.startswith("loss.")}


def _check_size(path: Path) -> None:
    """Refuse a checkpoint that claims more than it has, or much besides tensors, before any of it is read."""
    if not is_zipfile(path):  # as PyTorch wrote them before 1.6
        return
    with BoundedReads(path) as file, ZipFile(file) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    if sum(sizes.values()) > path.stat().st_size or any(sizes[name] > LARGEST for name in sizes if ".pkl" in name):
        raise ValueError("it claims more than it has")


def as_safetensors(path: Path, half: bool = False) -> bytes:
    """A checkpoint's weights as a safetensors file, the same bytes for the same weights; ``half``: as float16.

    Raises:
        InputError: see ``read_weights``; or a value is too large for float16.
    """
    state = read_weights(path, torch.device("cpu"))
    kinds = {torch.float32: torch.float16} if half else {}
    kept = {name: value.to(kinds.get(value.dtype, value.dtype)).contiguous() for name, value in state.items()}
    if odd := [name for name, value in kept.items() if not torch.equal(value.isfinite(), state[name].isfinite())]:
        raise InputError(path, f"{odd[0]} holds values that half precision can't", "Export it without --half.")
    return save(kept)


def check_fit(model: StageModel, path: Path) -> None:
    """Make sure that a safetensors file holds a network's weights, by its head, which no value is read for.

    Raises:
        InputError: other names, shapes or data types, a damaged head, or one that doesn't fit the file's length.
    """
    expected = {name: (KINDS.get(value.dtype), list(value.shape)) for name, value in model.state_dict().items()}
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > LARGEST_HEAD:
                raise ValueError("its head is too large")
        with safe_open(path, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            kinds = {name: part.get_dtype() for name, part in parts.items()}
            found = {name: (FULL.get(kind, kind), parts[name].get_shape()) for name, kind in kinds.items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(path, f"doesn't hold weights ({_reason(error)})", _REMEDY) from error
    if found != expected:
        raise InputError(path, "doesn't hold the weights of its network", _REMEDY)


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
