"""The rows of the benchmark: the same work for kitseg and for its peers.

``{work}`` in a command is the folder with cases and what is made of them, ``{out}`` a fresh path for a side's result.
A command that ends in ``.py`` is a script of ``sides``; each runs in its own environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

METHODS = ("two-phase", "two-stage", "guided-unetpp", "dual-unet", "progressive")  # resenc: the built-in network
KITSEG = ("-m", "kitseg")
TARGETS = {("two-phase", 1): "65 s and 4.5 GB", ("two-phase", 5): "200 s"}


@dataclass(frozen=True)
class Side:
    """Who does the work, in which environment, and how."""

    name: str
    environment: str
    command: Sequence[str]


@dataclass(frozen=True)
class Row:
    """The same work by all sides.

    unit: ``s``, where less is better, or something a second, where more is; prepare: what must be there before;
    target: what is aimed at, in words; labels: whether sides write label arrays to ``{out}`` that are compared with
    the first side's; repeats: of each side; gpu: whether it needs one.
    """

    name: str
    title: str
    sides: Sequence[Side]
    unit: str = "s"
    prepare: Sequence[str] = ()
    target: str = ""
    labels: bool = False
    repeats: int = 3
    gpu: bool = False


def window(name: str, environment: str, precision: str, *engine: str) -> Side:
    """A side of a window row."""
    return Side(name, environment, (f"window_{environment}.py", "{work}", precision, "{out}", *engine))


def predict(
    method: str, slices: int, checkpoints: int, engine: str, precision: str = "f32", device: str = "cpu"
) -> Side:
    """The whole way from a scan to labels."""
    run = "builtin" if method == "builtin" else f"{{runs}}/{method}-{checkpoints}"
    scan = f"{{work}}/scans/case_{slices:05d}.nii.gz"
    options = ("--model", run, "-o", "{out}", "--device", device, "--precision", precision, "--engine", engine)
    return Side(f"kitseg {engine} {precision}", "kitseg", (*KITSEG, "predict", scan, *options))


def run_of(method: str, checkpoints: int) -> str:
    """The step that makes a run for ``predict``."""
    return f"run {method} {checkpoints}"


PREPROCESS = Row(
    "preprocess",
    "Preprocessing 4 cases with two workers (kitseg: both grids of two-phase; nnU-Net: 3d_fullres, planned before)",
    (
        Side(
            "kitseg",
            "kitseg",
            (*KITSEG, "preprocess", "{work}/data", "--to", "{out}", "--method", "two-phase", "--jobs", "2"),
        ),
        Side("nnU-Net", "nnunetv2", ("preprocess_nnunetv2.py",)),
    ),
    prepare=("data", "plan"),
    target="5 times as fast, a third of the memory",
)

LOADERS = (
    Row(
        "loader",
        "Patches of 64 × 192 × 192, one process, no augmentation",
        (
            Side("kitseg", "kitseg", ("loader_kitseg.py", "{work}")),
            Side("nnU-Net", "nnunetv2", ("loader_nnunetv2.py", "{work}")),
            Side("TorchIO", "torchio", ("loader_torchio.py", "{work}")),
        ),
        "patches/s",
        ("data", "preprocessed", "nnunet"),
        "nnU-Net's rate",
    ),
    Row(
        "loader-augmented",
        "The same with each side's own default augmentation",
        (
            Side("kitseg", "kitseg", ("loader_kitseg.py", "{work}", "--augment")),
            Side("nnU-Net", "nnunetv2", ("loader_nnunetv2.py", "{work}", "--augment")),
        ),
        "patches/s",
        ("data", "preprocessed", "nnunet"),
        "nnU-Net's rate",
    ),
)

WINDOWS = (
    Row(
        "window",
        "Sliding window of 64 × 192 × 192 over 96 × 288 × 288, float32, the same network and blending",
        (
            window("kitseg", "kitseg", "float32"),
            window("MONAI", "monai", "float32"),
            window("nnU-Net", "nnunetv2", "float32"),
            window("kitseg with OpenVINO", "kitseg", "float32", "openvino"),
        ),
        prepare=("data", "preprocessed", "network"),
        target="4 times as fast, 0.6 of the memory, the same labels on 99.99 % of voxels",
        labels=True,
        repeats=2,
    ),
    Row(
        "window-bfloat16",
        "The same, kitseg in bfloat16 beside kitseg in float32",
        (window("kitseg float32", "kitseg", "float32"), window("kitseg bfloat16", "kitseg", "bfloat16")),
        prepare=("data", "preprocessed", "network"),
        labels=True,
        repeats=2,
    ),
)

PREDICT = tuple(
    Row(
        f"predict-{method}-{checkpoints}",
        f"`kitseg predict`, {method}, checkpoints a stage: {checkpoints}, 512 × 512 × 139",
        [predict(method, 139, checkpoints, *engine) for engine in engines],
        prepare=("data", "scan 139", *(() if method == "builtin" else (run_of(method, checkpoints),))),
        target=TARGETS.get((method, checkpoints), ""),
        repeats=1,
    )
    for checkpoints, engines in (
        (1, (("winograd", "f32"), ("torch", "f32"), ("openvino", "bf16"))),
        (5, (("winograd", "f32"),)),
    )
    for method in (*METHODS, *(["builtin"] if checkpoints == 1 else []))
)

SLICES = tuple(
    Row(
        f"slices-{slices}",
        f"`kitseg predict`, two-phase, one checkpoint, 512 × 512 × {slices}",
        (predict("two-phase", slices, 1, "winograd"),),
        prepare=("data", f"scan {slices}", run_of("two-phase", 1)),
        target="6 GB" if slices == 1059 else "",
        repeats=1,
    )
    for slices in (60, 250, 500, 1059)
)

POSTPROCESS = Row(
    "postprocess",
    "The two largest components without holes, 512 × 512 × 505 (kitseg fills each slice, scipy the volume)",
    (
        Side("kitseg", "kitseg", ("postprocess.py", "kitseg")),
        Side("scipy", "kitseg", ("postprocess.py", "scipy")),
    ),
    target="0.7 s",
)

STARTUP = (
    Row("help", "`kitseg --help`", (Side("kitseg", "kitseg", (*KITSEG, "--help")),), target="0.4 s", repeats=7),
    Row("methods", "`kitseg methods`", (Side("kitseg", "kitseg", (*KITSEG, "methods")),), target="0.8 s", repeats=7),
)

GPU = (
    *(
        Row(
            f"gpu-predict-{method}",
            f"`kitseg predict --device cuda`, {method}, one checkpoint, 512 × 512 × 139",
            (predict(method, 139, 1, "torch", "auto", "cuda"),),
            prepare=("data", "scan 139", run_of(method, 1)),
            gpu=True,
        )
        for method in METHODS
    ),
    Row(
        "gpu-train",
        "Training samples a second, batches of 2 (kitseg: two-phase's coarse V-Net, bfloat16; nnU-Net: its own plan)",
        (
            Side("kitseg", "kitseg", ("train_kitseg.py", "{work}", "cuda")),
            Side("nnU-Net", "nnunetv2", ("train_nnunetv2.py", "{work}", "cuda")),
        ),
        "samples/s",
        ("data", "preprocessed", "nnunet"),
        gpu=True,
    ),
)

ROWS = (PREPROCESS, *LOADERS, *WINDOWS, *PREDICT, *SLICES, POSTPROCESS, *STARTUP, *GPU)
