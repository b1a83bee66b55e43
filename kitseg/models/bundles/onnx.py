"""A trained model's networks as ONNX files, each compared with PyTorch, and a description of what lies around them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kitseg import __version__
from kitseg.errors import KitsegError, UsageError, fault, require_extra
from kitseg.inference.channels import label_ids
from kitseg.inference.windows import SlidingWindow
from kitseg.models.bundles.bundle import bundle_of
from kitseg.models.bundles.export import CODE_LICENSE, KITS19_LICENSE
from kitseg.models.chain import needed_heads
from kitseg.models.members import members_of
from kitseg.models.model import Model, open_model
from kitseg.models.stage import TrainedStage
from kitseg.models.weights import Checkpoint
from kitseg.runtime.files import atomic_write, file_digest, write_json
from kitseg.runtime.overwrite import refuse_overwrite
from kitseg.stages.model import StageModel

SCHEMA = 1
MANIFEST = "model.json"
OPSET = 18
SIDE = 64  # voxels of the inputs that a network is traced and compared with, unless its window has a size
SLICE = 256  # pixels of slices
SAME = 0.9999  # of the labels must be PyTorch's
NEAR = 1e-3  # of PyTorch's probabilities


@dataclass(frozen=True)
class Network:
    """An exported network: its file below the folder, and how it compares with PyTorch on noise.

    threshold: from which foreground counts, None for the most probable channel; largest_difference: of probabilities;
    same_labels: the share of voxels.
    """

    file: str
    fold: int
    stage: str
    sha256: str
    outputs: tuple[str, ...]
    threshold: float | None
    largest_difference: float
    same_labels: float


class _Heads(nn.Module):
    """The probabilities of some of a stage's heads, with one pass through its network."""

    def __init__(self, model: StageModel, heads: Sequence[int]) -> None:
        super().__init__()
        self.model, self.heads = model, heads

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits = self.model.logits(image)
        known = self.model.with_logits(lambda _: logits)
        return tuple(known.probabilities(image, head) for head in self.heads)


def export_onnx(
    model: Path | str, to: Path, name: str | None = None, on_done: Callable[[Network], None] = lambda _: None
) -> list[Network]:
    """Write an ONNX file for each network of a model into a folder, and ``model.json``, which describes the rest.

    Args:
        model: a run (its finished folds), a fold of one, an ensemble file, a bundle or ``builtin``.
        to: the folder.
        name: of the model; the bundle's or the methods' where it is None.
        on_done: gets each network.

    Raises:
        UsageError: not a model, onnxruntime or onnxscript isn't installed, or files of another origin are in the way;
        KitsegError: a network can't be exported, or computes something else as ONNX.
    """
    require_extra("onnx", "onnxruntime", "onnxscript")
    if to.is_file():
        raise UsageError(f"{to} is a file: ONNX files go into a folder")
    refuse_overwrite(to / MANIFEST, "ONNX model")
    members, steps = members_of(model)
    opened = [open_model(member.run, "cpu", mirror=member.mirror, engine="torch") for member in members]
    bundles = [bundle.manifest.name for one in opened if (bundle := bundle_of(one.run))]
    names = dict.fromkeys(bundles or [one.method.name for one in opened])
    rows, networks = [], list[Network]()
    for number, (one, member) in enumerate(zip(opened, members, strict=True)):
        found = []
        for network in _networks(one, to, f"{number}/"):
            on_done(network)
            found.append(network)
        networks += found
        rows.append({**_facts(one), "weight": member.weight, "mirror": member.mirror, "networks": found})
    write_json(
        to / MANIFEST,
        SCHEMA,
        {
            "onnx": OPSET,
            "name": name or "+".join(names),
            "kitseg": __version__,
            "members": rows,
            "postprocess": opened[0].method.postprocess if steps is None else steps,
        },
    )
    return networks


def _facts(model: Model) -> dict[str, Any]:
    """What ``model.json`` states about a member: how each network's input is made, and where the outputs come from."""
    bundle, info = bundle_of(model.run), model.run.read_info()
    usual = CODE_LICENSE if info.phantom and not info.also else KITS19_LICENSE
    stages = {
        name: {
            "inputs": stage.spec.inputs,
            "grid": asdict(stage.spec.grid),
            "channels": stage.spec.channels,
            "window": stage.spec.parts["module"]["window"],
            **{part: stage.spec.parts[part] for part in ("region", "intensity", "link")},
        }
        for name, stage in model.chain.items()
    }
    return {
        "method": model.method.name,
        "paper": model.method.paper,
        "licenses": bundle.manifest.licenses if bundle else {"weights": usual, "labels": usual},
        "labels": model.method.labels.plain(),
        "stages": stages,
        "outputs": {name: f"{one.stage}.{one.head}.{one.channel}" for name, one in model.outputs.items()},
    }


def _networks(model: Model, to: Path, prefix: str) -> Iterator[Network]:
    for fold, stages in model.stages.items():
        for name, stage in stages.items():
            heads = needed_heads(name, stages, model.heads)
            for number, path in enumerate(stage.checkpoints):
                file = f"{prefix}fold_{fold}/{name}/{number}.onnx"
                refuse_overwrite(to / file, "ONNX")
                module = _Heads(Checkpoint(path, stage.model).load(), [stage.spec.heads.index(h) for h in heads])
                outputs = tuple(f"probabilities_{head}" for head in heads)
                facts = {"channels": ",".join(stage.spec.channels), "method": model.method.name, "stage": name}
                try:
                    with atomic_write(to / file) as partial:
                        _write(partial, module.eval(), stage, outputs, facts)
                        difference, same = compare(partial, module, stage)
                        if not difference <= NEAR or same < SAME:  # NaN isn't near
                            raise KitsegError(
                                f"{file}: differs from PyTorch ({difference:.2g}, {same:.4%} same labels)"
                            )
                except Exception as error:  # a network of the user's own can make the exporter raise anything
                    if isinstance(error, KitsegError) or fault(error):
                        raise
                    reason = str(error).partition("\n")[0] or type(error).__name__
                    raise KitsegError(f"stage {name} can't be written as ONNX ({reason})") from error
                digest = file_digest(to / file)
                yield Network(file, fold, name, digest, outputs, stage.threshold, difference, same)


def _inputs(stage: TrainedStage) -> list[Tensor]:
    """Noise of the shapes that a network is compared with, the first one also traced with."""
    channels, random = stage.input_transform.channels, torch.Generator().manual_seed(0)
    flat = stage.window.part((2, 2, 2))[0] == 1
    shape = stage.window.part((SLICE, SLICE, SLICE) if flat else (SIDE, SIDE, SIDE))
    shapes = [shape] if _is_fixed(stage) else [shape, (*shape[:2], shape[2] // 2)]
    return [torch.randn(1, channels, *one, generator=random) for one in shapes]


def _is_fixed(stage: TrainedStage) -> bool:
    return isinstance(stage.window, SlidingWindow)


def _write(path: Path, module: nn.Module, stage: TrainedStage, outputs: Sequence[str], facts: dict[str, str]) -> None:
    image, log = _inputs(stage)[0], logging.getLogger("torch.onnx")
    axes = [] if _is_fixed(stage) else [axis for axis in (2, 3, 4) if image.shape[axis] > 1]
    level, free = log.level, dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                module,
                (image,),
                input_names=["image"],
                output_names=list(outputs),
                opset_version=OPSET,
                dynamic_shapes=(free,),
                dynamo=True,
                verbose=False,
            )
    finally:
        log.setLevel(level)
    program.model.producer_name, program.model.producer_version = "kitseg", __version__
    program.model.metadata_props.update(facts)
    program.save(str(path))


@torch.inference_mode()
def compare(path: Path, module: Callable[[Tensor], tuple[Tensor, ...]], stage: TrainedStage) -> tuple[float, float]:
    """The largest difference of probabilities between an ONNX file and PyTorch, and the share of the same labels.

    NaN on one side makes the difference NaN.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    difference, same = 0.0, 1.0
    for image in _inputs(stage):
        for found, expected in zip(session.run(None, {"image": image.numpy()}), module(image), strict=True):
            values = torch.from_numpy(found)
            difference = float(np.maximum(difference, float((values - expected).abs().max())))
            labels, others = (label_ids(one[0], stage.spec.channels, stage.threshold) for one in (values, expected))
            same = min(same, float((labels == others).mean()))
    return difference, same
