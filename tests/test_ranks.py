"""Several ranks on the CPU (gloo), however they are started: one set of files, and the same training as on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALLEST, kitseg, once
from method_runs import history

pytestmark = pytest.mark.slow
RATE, STEPS = 1e-4, 4
ALL = os.environ.get("KITSEG_ALL") == "1"
TRAIN = (
    "train",
    *SMALLEST,
    "--epochs=2",
    "--set=size.validate_every=1",
    "--set=size.coarse_samples=2",
    "--set=size.fine_samples=2",
    "--set=stages.coarse.batch=4",
    f"--set=size.learning_rate={RATE}",
    "--jobs=1",
    "--device=cpu",
    "--set=stages.*.precision=32-true",  # rounding in bfloat16 would hide what is compared
)
FOLD = Path("runs/two-phase-tiny/fold_0")
Command = tuple[Sequence[str], Mapping[str, str]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """A working folder with preprocessed cases, a split, and the coarse stage trained by one rank."""

    def make(folder: Path) -> None:
        (folder / "data").symlink_to(phantoms / "data")
        done = kitseg(folder, *TRAIN, "--stage=coarse")
        assert done.code == 0, done.text

    return once(tmp_path_factory, "one-rank", make)


def beside(alone: Path, folder: Path) -> Path:
    """An empty working folder with the same data, preprocessed cases and split."""
    for name in ("data", "preprocessed", "splits.json"):
        (folder / name).symlink_to(alone / name)
    return folder


def start(folder: Path, commands: Sequence[Command], timeout: float = 500) -> list[str]:
    """Run the commands at the same time, to a good end; what each of them printed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", *command], cwd=folder, env={**clean, **more},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for command, more in commands
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, text in zip(running, printed, strict=True):
        assert process.returncode == 0, text
    return printed


def check_same_training(alone: Path, folder: Path) -> None:
    """Losses, scores and weights are those of one rank but for rounding; one writer has written."""
    one, several = (history(path / FOLD / "coarse/history.csv") for path in (alone, folder))
    assert [row.keys() for row in several] == [row.keys() for row in one]
    for row, other in zip(one, several, strict=True):
        for name, value in row.items():
            within = 1e-4 if "dice" in name else 1e-5  # with four ranks a voxel may change its label
            assert other[name] == pytest.approx(value, abs=within), name
    weights, others = (
        torch.load(path / FOLD / "coarse/last.ckpt", weights_only=True)["state_dict"] for path in (alone, folder)
    )
    assert weights.keys() == others.keys()
    far = [(others[name] - weight).abs().flatten() for name, weight in weights.items() if weight.dim() == 5]
    assert torch.cat(far).mean() < RATE * STEPS / 20  # Adam moves a weight whose gradient is all rounding anywhere
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["two-phase-tiny"]
    files, expected = ({path.name for path in (f / FOLD / "coarse").iterdir()} for f in (folder, alone))
    assert files == expected
    assert not list(folder.rglob(".partial*"))


def slurm(task: int, port: int) -> dict[str, str]:
    """What `srun --ntasks-per-node=2` tells a task on a single node."""
    names = ("JOB_ID", "NTASKS", "STEP_NUM_TASKS", "NTASKS_PER_NODE", "NNODES", "NODEID", "PROCID", "LOCALID")
    values = (4242, 2, 2, 2, 1, 0, task, task)
    variables = {f"SLURM_{name}": str(value) for name, value in zip(names, values, strict=True)}
    return {**variables, "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(port)}


def node(number: int, port: int) -> dict[str, str]:
    """What a user sets on one of several machines."""
    return {"NODE_RANK": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def test_two_processes(alone: Path, tmp_path: Path) -> None:
    [printed] = start(beside(alone, tmp_path), [(["kitseg", *TRAIN, "--processes=2"], {})])
    assert printed.count("coarse: starts") == 1
    assert "2 × CPU" in printed
    check_same_training(alone, tmp_path)
    rows = history(tmp_path / FOLD / "fine/history.csv")
    assert len(rows) == 2
    assert json.loads((tmp_path / FOLD / "fine/done.json").read_text())["checkpoints"]


def test_two_nodes_of_torchrun(alone: Path, tmp_path: Path, free_port: int) -> None:
    torchrun = ("torch.distributed.run", "--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port}")
    command = ("--nproc-per-node=1", "-m", "kitseg", *TRAIN, "--stage=coarse")
    nodes = [([*torchrun, f"--node-rank={number}", *command], {}) for number in range(2)]
    printed = "".join(start(beside(alone, tmp_path), nodes))
    assert printed.count("coarse: starts") == 1
    assert "2 × CPU on 2 nodes" in printed
    check_same_training(alone, tmp_path)


@pytest.mark.skipif(not ALL, reason="minutes on few cores: set KITSEG_ALL=1")
@pytest.mark.parametrize(
    ("environment", "options", "ranks"),
    [(slurm, (), "2 × CPU"), (node, ("--nodes=2", "--processes=2"), "4 × CPU on 2 nodes")],
)
def test_srun_and_nodes_started_by_hand(
    alone: Path, tmp_path: Path, free_port: int, environment: Any, options: Sequence[str], ranks: str
) -> None:
    tasks = [(["kitseg", *TRAIN, "--stage=coarse", *options], environment(task, free_port)) for task in range(2)]
    printed = start(beside(alone, tmp_path), tasks)
    assert [text.count("coarse: starts") for text in printed] == [1, 0]
    assert ranks in printed[0]
    check_same_training(alone, tmp_path)


def test_deterministic_with_workers_gives_the_same_bits(alone: Path, tmp_path: Path) -> None:
    command = ["kitseg", *TRAIN, "--stage=coarse", "--epochs=1", "--workers=2", "--deterministic"]
    kept = []
    for name in ("one", "other"):
        start(beside(alone, tmp_path) if name == "one" else tmp_path, [([*command, f"--name={name}"], {})])
        kept.append(torch.load(tmp_path / "runs" / name / "fold_0/coarse/last.ckpt", weights_only=True))
    one, other = (checkpoint["state_dict"] for checkpoint in kept)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_more_gpus_than_there_are(alone: Path, tmp_path: Path) -> None:
    options = [option for option in TRAIN if option != "--device=cpu"]
    result = kitseg(beside(alone, tmp_path), *options, "--gpus=99")
    assert result.code == 2
    assert "99 GPU(s) requested" in result.text
    assert not (tmp_path / "runs").exists()
