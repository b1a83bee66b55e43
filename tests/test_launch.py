"""How a training was started, read from the environment; and its processes, which end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SMALLEST, kitseg

from kitseg.errors import UsageError
from kitseg.runtime.device import Machine
from kitseg.runtime.launcher import Launch
from kitseg.runtime.sharding import Share
from kitseg.training.ddp import RankCoordinator

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "5", "WORLD_SIZE": "8",
            "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "MASTER_ADDR": "a1",
            "MASTER_PORT": "29500"}  # fmt: skip
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2",
        "SLURM_NODEID": "1", "SLURM_LOCALID": "1", "SLURM_PROCID": "5", "SLURM_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "1234567"}  # fmt: skip
BY_HAND = {"NODE_RANK": "1", "MASTER_ADDR": "a1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher() -> Iterator[None]:
    """An environment that no launcher made, restored afterwards."""
    before = dict(os.environ)
    for key in {*os.environ} & {*TORCHRUN, *SRUN, *BY_HAND}:
        del os.environ[key]
    yield
    os.environ.clear()
    os.environ.update(before)


def test_alone() -> None:
    launch = Launch.here(nodes=1)
    assert (launch.index, launch.of) == (0, 1)
    launch, machine = launch.agreed(Machine("cpu", ranks=4))
    assert (machine.ranks, machine.nodes, machine.world) == (4, 1, 4)
    assert (launch.index, launch.of, launch.started) == (0, 4, False)


def test_under_torchrun() -> None:
    os.environ.update(TORCHRUN)
    launch = Launch.here(nodes=1)
    assert launch == Launch(node=1, local=1, nodes=2, per_node=4, address="a1", port=29500, agent=True)
    assert (launch.index, launch.of) == (5, 8)
    same, machine = launch.agreed(Machine())
    assert same == launch
    assert (machine.world, machine.node, machine.local) == (8, 1, 1)


def test_under_srun() -> None:
    os.environ.update(SRUN)
    launch = Launch.here(nodes=2)
    assert launch == Launch(node=1, local=1, nodes=2, per_node=4, address="gpu07", port=15000 + 4567)
    assert launch.agreed(Machine(ranks=4, nodes=2))[1].world == 8


def test_a_batch_script_without_srun_stands_alone() -> None:
    os.environ.update(SRUN)
    del os.environ["SLURM_STEP_NUM_TASKS"]
    assert Launch.here(nodes=1).of == 1


def test_one_task_a_node_starts_the_ranks_of_the_node() -> None:
    os.environ.update(SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
                              "SLURM_LOCALID": "0", "SLURM_PROCID": "1"})  # fmt: skip
    launch, machine = Launch.here(nodes=1).agreed(Machine("cpu", ranks=4))
    assert (machine.ranks, machine.nodes, launch.started) == (4, 2, False)
    os.environ.update(launch.environment(local=3, port=4711))
    there, _ = Launch.here(nodes=1).agreed(Machine("cpu", ranks=4))
    assert there == Launch(node=1, local=3, nodes=2, per_node=4, address="gpu07", port=4711)
    assert (there.index, Share.here()) == (7, Share(7, 8))


def test_by_hand() -> None:
    os.environ.update(BY_HAND)
    launch = Launch.here(nodes=2)
    assert launch == Launch(node=1, nodes=2, address="a1", port=29500)
    assert launch.agreed(Machine("cpu", ranks=2, nodes=2))[1].world == 4


@pytest.mark.parametrize(
    ("variables", "machine", "words"),
    [
        (TORCHRUN, Machine(ranks=3), "3 ranks asked for, the launcher started 4"),
        (TORCHRUN, Machine(ranks=4, nodes=3), "3 nodes asked for"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, Machine(), "8 processes, 3 on each machine"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_NTASKS_PER_NODE"}, Machine(), "srun needs --ntasks-per-node"),
        ({k: v for k, v in BY_HAND.items() if k != "MASTER_ADDR"}, Machine(nodes=2), "MASTER_ADDR not set"),
        (BY_HAND | {"NODE_RANK": "2"}, Machine(nodes=2), "NODE_RANK 2 of 2 nodes"),
        (BY_HAND | {"MASTER_PORT": "many"}, Machine(nodes=2), "many"),
    ],
)
def test_contradictions(variables: dict[str, str], machine: Machine, words: str) -> None:
    os.environ.update(variables)
    with pytest.raises(UsageError, match=words):
        Launch.here(machine.nodes).agreed(machine)


def test_nodes_without_a_launcher_in_one_line(tmp_path: Path) -> None:
    result = kitseg(tmp_path, "train", *SMALLEST, "--nodes=2", "--device=cpu")
    assert result.code == 2
    assert "--nodes 2 needs torchrun, srun, or in the environment NODE_RANK (0 to 1)" in result.text


#: A rank: it receives trainings and adds their numbers over all ranks, until it ends as its argument asks.
RANK = """
import os, signal, sys, time
import torch, torch.distributed as dist
from kitseg.errors import KitsegError
from kitseg.runtime.launcher import Launch
from kitseg.runtime.signals import defer, interruptible
from kitseg.training.ddp import RankCoordinator

end = sys.argv[1]

def trainings():
    yield from (1, 2, 3)
    if end == "disk":
        raise KitsegError("the disk is full")

try:
    with interruptible(), RankCoordinator(Launch.here(3), "gloo", []) as coordinator:
        for number in coordinator.share(trainings):
            total = torch.tensor(number)
            dist.all_reduce(total)
            print(int(total), flush=True)
            if number == 2 and coordinator.launch.index == 1:
                if end == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if end == "SIGTERM":
                    os.kill(os.getpid(), signal.SIGTERM)
                if end == "hangs":
                    signal.pause()
            if number == 2 and end == "validates":
                if coordinator.launch.index == 2:
                    os.kill(os.getpid(), signal.SIGUSR1)
                defer(True)
                while True:
                    signal.pause()
            if number == 2 and coordinator.launch.index == 2 and end == "hangs":
                raise KitsegError("the loss became NaN")
except KitsegError as error:
    sys.exit(f"KitsegError: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "codes", "words"),
    [
        ("well", [0, 0, 0], ["", "", ""]),
        ("disk", [1, 1, 1], ["the disk is full", "rank 0: the disk is full", "rank 0: the disk is full"]),
        ("killed", [1, -signal.SIGKILL, 1], ["another process", "", "another process"]),
        ("SIGTERM", [143, 143, 143], ["SIGTERM", "SIGTERM", "SIGTERM"]),
        ("validates", [138, 138, 138], ["SIGUSR1", "SIGUSR1", "SIGUSR1"]),
        ("hangs", [1, 1, 1], ["rank 2: the loss became NaN", "rank 2: the loss became NaN", "the loss became NaN"]),
    ],
)
def test_all_ranks_end_together(free_port: int, end: str, codes: list[int], words: list[str]) -> None:
    """Several collective operations in one process group; where one rank fails or is stuck, none is left waiting."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, end], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | BY_HAND | {"NODE_RANK": str(number), "MASTER_ADDR": "127.0.0.1",
                                        "MASTER_PORT": str(free_port)},
        )
        for number in range(3)
    ]  # fmt: skip
    try:
        printed = [rank.communicate(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == codes, printed
    for (totals, errors), expected in zip(printed, words, strict=True):
        assert "3\n6\n".startswith(totals) or totals == "3\n6\n9\n"
        assert expected in errors
        assert "Traceback" not in errors
    if end == "well":
        assert all(totals == "3\n6\n9\n" for totals, _ in printed)


def test_a_place_where_nobody_can_meet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        launch = Launch(nodes=2, address="127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(UsageError, match=r"can't connect to 127\.0\.0\.1.*MASTER_PORT to a free port"):
            RankCoordinator(launch, "gloo", [])
