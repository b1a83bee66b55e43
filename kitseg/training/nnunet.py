"""Networks of nnU-Net's residual-encoder presets from their model folders, as weights to start from.

A model folder holds ``dataset.json``, ``plans.json`` and ``fold_K/checkpoint_final.pth``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitseg.config import StageSpec
from kitseg.errors import InputError, UsageError
from kitseg.models.weights import read_weights
from kitseg.nets.residual_unet import from_nnunet
from kitseg.plain_files import read_json
from kitseg.runtime.files import read_errors

PLANS, DATASET, CHECKPOINT = "plans.json", "dataset.json", "checkpoint_final.pth"
ENCODER = "ResidualEncoderUNet"
CT = "CTNormalization"
NET = "kitseg.nets.residual_unet.ResidualUNet"
#: nnU-Net's order of the axes of files; the second of those whose slices come first, such as the challenge's.
PLAIN, TURNED = [0, 1, 2], [2, 0, 1]
_REMEDY = "Give the folder of a model of nnU-Net's ResEnc presets in 3d_fullres."


@dataclass(frozen=True)
class NnunetModel:
    """A model folder of nnU-Net.

    network: ``widths``, ``blocks``, ``strides`` and ``kernels`` as ``ResidualUNet`` takes them; spacing: mm along
    slices, rows and columns; hu: low, high, shift and scale; classes: names of exclusive classes by id, empty for
    regions; turned: its rows are our columns; fold: the name of the folder of the fold that was asked for, empty where
    none was; file: the name of the files of weights.
    """

    folder: Path
    network: Mapping[str, Any]
    spacing: Sequence[float]
    patch: Sequence[int]
    batch: int
    hu: Mapping[str, float]
    classes: Sequence[str]
    turned: bool
    fold: str = ""
    file: str = CHECKPOINT

    def checkpoint(self, fold: int) -> Path:
        """The weights of the fold that was asked for, else of this one, else of the first that is there.

        Raises:
            InputError: there is none.
        """
        there = sorted(path.parent.name for path in self.folder.glob(f"fold_*/{self.file}"))
        wanted = [self.fold] if self.fold else [f"fold_{fold}", *there]
        if not (found := [name for name in wanted if name in there]):
            raise InputError(self.folder, f"has no {self.fold or 'fold_0'}/{self.file}", _REMEDY)
        return self.folder / found[0] / self.file

    def check(self, stage: StageSpec) -> None:
        """Make sure that a stage has this network.

        Raises:
            UsageError: it has other widths, blocks, strides or kernels.
        """
        net = stage.parts["module"]["net"]
        odd = [key for key, value in self.network.items() if [*map(_plain, net[key])] != value]
        if odd:
            raise UsageError(
                f"{self.folder}: its network has other {', '.join(odd)} than stage {stage.name}. `kitseg plan "
                f"--init-from {self.folder}` plans a stage with this network; train with --plan and --init-from"
            )

    def difference(self, stage: StageSpec) -> str:
        """A line on the grid and the intensities that it was trained on; empty where the stage has the same."""
        grid, seen = stage.grid, stage.parts["intensity"]
        here = [grid.slices, grid.inplane, grid.inplane, *(seen.get(key) for key in self.hu)]
        there = [*self.spacing, *self.hu.values()]
        if not seen.get("windows") and all(
            a is not None and abs(a - b) <= 0.05 * abs(b) for a, b in zip(here, there, strict=True)
        ):
            return ""
        spacing = " × ".join(f"{mm:.3g}" for mm in self.spacing)
        return (
            f"{self.folder} learned from voxels of {spacing} mm and from {there[3]:g} to {there[4]:g} HU, less "
            f"{there[5]:g} and divided by {there[6]:g}, unlike stage {stage.name}; `kitseg plan --init-from` plans a "
            "stage with the same"
        )

    def adopt(self, block: Mapping[str, Any]) -> dict[str, Any]:
        """A stage's block of a size with this network, its grid, patch and batch."""
        slices, rows, _ = self.spacing
        grid = {"slices": slices, "inplane": rows}
        return {**block, **self.network, "grid": grid, "patch": list(self.patch), "batch": self.batch}

    def weights(self, path: Path, channels: Sequence[str]) -> dict[str, Tensor]:
        """The weights of a checkpoint under the names of a ``StageModel`` with these channels.

        The heads are left out unless they are for the same classes. No code in the file is executed.

        Raises:
            InputError: see ``read_weights``.
        """
        numbers: list[Any] = [type(name, (_Ignored,), {"__module__": module}) for module, name in _NUMBERS]
        with torch.serialization.safe_globals(numbers):
            state = read_weights(path, torch.device("cpu"), "network_weights")
        found = {f"net.{name}": weight for name, weight in from_nnunet(state).items()}
        if self.turned:
            found = {name: w.transpose(-1, -2) if w.dim() == 5 else w for name, w in found.items()}
        return {name: w for name, w in found.items() if list(channels) == self.classes or ".heads." not in name}


#: NumPy's numbers in a checkpoint's log, which are skipped.
_NUMBERS = (("numpy", "dtype"), ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"))


class _Ignored:
    def __init__(self, *values: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def find_nnunet(model: str) -> NnunetModel | None:
    """A model folder of nnU-Net, or a folder ``fold_K`` of one or a checkpoint in that; None for anything else.

    Raises:
        InputError: its files are damaged, or describe another network.
    """
    path, file = Path(model), CHECKPOINT
    if path.suffix == Path(CHECKPOINT).suffix:
        path, file = path.parent, path.name
    folder = next((one for one in (path, path.parent) if (one / PLANS).is_file() and (one / DATASET).is_file()), None)
    if folder is None:
        return None
    plans, dataset = _json(folder / PLANS), _json(folder / DATASET)
    try:
        configuration = _configuration(plans, folder.absolute().name.split("__")[-1])
        network = _network(configuration)
        if network is None:
            found = _architecture(configuration).rpartition(".")[-1]
            problem = f"describes a network of another kind ({found}) than the 3D {ENCODER} of the ResEnc presets"
            raise InputError(folder / PLANS, problem, _REMEDY)
        if (scaling := configuration.get("normalization_schemes", [CT])[0]) != CT:
            problem = f"scales intensities by {scaling}, not by {CT}, which clips HU as kitseg does"
            raise InputError(folder / PLANS, problem, _REMEDY)
        axes = plans.get("transpose_forward", PLAIN)
        if axes not in (PLAIN, TURNED):
            raise ValueError(f"it turned the axes of its files by {axes}, not by {PLAIN} or {TURNED}")
        if turned := axes == TURNED:
            network |= {key: [[z, x, y] for z, y, x in network[key]] for key in ("strides", "kernels")}
        ct = plans["foreground_intensity_properties_per_channel"]["0"]
        names = {"low": "percentile_00_5", "high": "percentile_99_5", "shift": "mean", "scale": "std"}
        hu = {key: round(float(ct[name]), 1) for key, name in names.items()}
        spacing, patch = ([float(mm) for mm in configuration["spacing"]], [*map(int, configuration["patch_size"])])
        if turned:
            patch = [patch[0], patch[2], patch[1]]
        labels = dataset["labels"]
        classes = sorted(labels, key=labels.get) if all(isinstance(n, int) for n in labels.values()) else []
        fold, batch = "" if folder == path else path.name, int(configuration["batch_size"])
        return NnunetModel(folder, network, spacing, patch, batch, hu, classes, turned, fold, file)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(folder / PLANS, f"can't be used ({type(error).__name__}: {error})", _REMEDY) from error


def stage_for(stages: Mapping[str, StageSpec]) -> StageSpec:
    """The last stage with a ``ResidualUNet``. Raises UsageError: there is none."""
    found = [spec for spec in stages.values() if spec.parts["module"].get("net", {}).get("_target_") == NET]
    if not found:
        raise UsageError("--init-from: nnU-Net's weights fit a residual-encoder U-Net; use --method resenc")
    return found[-1]


def _configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration of a plan with what it inherits."""
    there = plans["configurations"]
    found = dict(there[name if name in there else "3d_fullres"])
    while (parent := found.pop("inherits_from", None)) is not None:
        found = {**there[parent], **found}
    return found


def _network(configuration: Mapping[str, Any]) -> dict[str, Any] | None:
    """The network's settings as ``ResidualUNet`` takes them; None for another architecture."""
    if not _architecture(configuration).endswith(ENCODER):
        return None
    if "architecture" in configuration:
        known = configuration["architecture"]["arch_kwargs"]
        strides, kernels, widths = (known[key] for key in ("strides", "kernel_sizes", "features_per_stage"))
        blocks, decoder = known["n_blocks_per_stage"], known["n_conv_per_stage_decoder"]
    else:  # as nnU-Net wrote it before version 2.4
        strides, kernels = configuration["pool_op_kernel_sizes"], configuration["conv_kernel_sizes"]
        base, most = configuration["UNet_base_num_features"], configuration["unet_max_num_features"]
        widths = [min(most, base * 2**level) for level in range(len(strides))]
        blocks, decoder = (configuration[f"n_conv_per_stage_{part}"] for part in ("encoder", "decoder"))
    if len(strides[0]) != 3 or set(decoder) != {1}:
        return None
    return {"widths": list(widths), "blocks": list(blocks), "strides": _rows(strides), "kernels": _rows(kernels)}


def _architecture(configuration: Mapping[str, Any]) -> str:
    """The name of the network's class."""
    known = configuration.get("architecture")
    return str(known["network_class_name"] if known else configuration["UNet_class_name"])


def _rows(values: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[int(n) for n in row] for row in values]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) else value


def _json(path: Path) -> Any:
    try:
        with read_errors(path):
            return read_json(path, dict[str, Any])
    except ValueError as error:
        raise InputError(path, f"can't be read ({error})", _REMEDY) from error
