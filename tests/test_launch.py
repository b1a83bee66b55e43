"""How a training was started, told from the environment; and its processes, which fail together."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest
from conftest import SMALLEST, kitseg

from kitseg.errors import KitsegError, UsageError
from kitseg.runtime.device import Machine
from kitseg.runtime.launcher import Launch
from kitseg.training.ddp import RankCoordinator
from kitseg.training.signals import call

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "RANK": "5", "WORLD_SIZE": "8",
            "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1", "MASTER_ADDR": "a1",
            "MASTER_PORT": "29500"}  # fmt: skip
SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2",
        "SLURM_NODEID": "1", "SLURM_LOCALID": "1", "SLURM_PROCID": "5", "SLURM_NODELIST": "gpu[07-08]",
        "SLURM_JOB_ID": "1234567"}  # fmt: skip
BY_HAND = {"NODE_RANK": "1", "MASTER_ADDR": "a1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that no launcher made, restored afterwards."""
    for key in {*os.environ} & {*TORCHRUN, *SRUN, *BY_HAND}:
        monkeypatch.delenv(key)
    monkeypatch.setattr(os, "environ", os.environ.copy())


def test_alone() -> None:
    launch = Launch.here(nodes=1)
    assert (launch.index, launch.of) == (0, 1)
    machine = launch.agreed(Machine("cpu", ranks=4))
    assert (machine.ranks, machine.nodes, machine.world) == (4, 1, 4)
    assert "LOCAL_RANK" not in launch.environment(1234)
    assert "MASTER_PORT" not in launch.environment(1234)


def test_under_torchrun() -> None:
    os.environ.update(TORCHRUN)
    launch = Launch.here(nodes=1)
    assert launch == Launch(node=1, local=1, nodes=2, per_node=4, address="a1", port=29500, agent=True)
    assert (launch.index, launch.of) == (5, 8)
    assert launch.agreed(Machine()).world == 8
    told = launch.environment(4711)
    expected = {"NODE_RANK": "1", "LOCAL_RANK": "1", "RANK": "5", "MASTER_ADDR": "a1", "MASTER_PORT": "4711",
                "TORCHELASTIC_USE_AGENT_STORE": "False"}  # fmt: skip
    assert expected.items() <= told.items()


def test_under_srun() -> None:
    os.environ.update(SRUN)
    launch = Launch.here(nodes=2)
    assert launch == Launch(node=1, local=1, nodes=2, per_node=4, address="gpu07", port=15000 + 4567)
    assert launch.agreed(Machine(ranks=4, nodes=2)).world == 8


def test_a_batch_script_without_srun_stands_alone() -> None:
    os.environ.update(SRUN)
    del os.environ["SLURM_STEP_NUM_TASKS"]
    assert Launch.here(nodes=1).of == 1


def test_one_task_a_node_starts_the_ranks_of_the_node() -> None:
    os.environ.update(SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1",
                              "SLURM_LOCALID": "0", "SLURM_PROCID": "1"})  # fmt: skip
    launch = Launch.here(nodes=1)
    machine = launch.agreed(Machine("cpu", ranks=4))
    assert (machine.ranks, machine.nodes) == (4, 2)
    told = launch.environment(4711)
    assert "LOCAL_RANK" not in told
    assert told["NODE_RANK"] == "1"


def test_by_hand() -> None:
    os.environ.update(BY_HAND)
    launch = Launch.here(nodes=2)
    assert launch == Launch(node=1, nodes=2, address="a1", port=29500)
    assert launch.agreed(Machine("cpu", ranks=2, nodes=2)).world == 4


@pytest.mark.parametrize(
    ("variables", "machine", "says"),
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
def test_what_can_not_be_meant(variables: dict[str, str], machine: Machine, says: str) -> None:
    os.environ.update(variables)
    with pytest.raises(UsageError, match=says):
        Launch.here(machine.nodes).agreed(machine)


def test_nodes_without_a_launcher_in_one_line(tmp_path: Path) -> None:
    result = kitseg(tmp_path, "train", *SMALLEST, "--nodes=2", "--device=cpu")
    assert result.code == 2
    assert "--nodes 2 needs torchrun, srun, or in the environment NODE_RANK (0 to 1)" in result.text


def follow(launch: Launch, ends: list[str]) -> None:
    try:
        with RankCoordinator(launch) as coordinator:
            coordinator.follow()
            ends.append("followed")
    except KitsegError as error:
        ends.append(str(error))


@pytest.mark.parametrize("fails", [False, True])
def test_those_that_follow_end_as_the_first_does(free_port: int, fails: bool) -> None:
    launches = [Launch(node=number, nodes=3, port=free_port) for number in range(3)]
    ends: list[str] = []
    others = [threading.Thread(target=follow, args=(launch, ends)) for launch in launches[1:]]
    for thread in others:
        thread.start()
    if fails:
        with pytest.raises(KitsegError, match="the disk is full"), RankCoordinator(launches[0]):
            raise KitsegError("the disk is full")
    else:
        with RankCoordinator(launches[0]):
            pass
    for thread in others:
        thread.join(20)
    assert ends == ["another process of the training has failed; its own message says why" if fails else "followed"] * 2


def failed() -> None:
    raise KitsegError("another process of the training has failed")


def test_a_failure_elsewhere_ends_the_ranks_here() -> None:
    begun = time.monotonic()
    with pytest.raises(KitsegError, match="another process of the training has failed"):
        call(["sleep", "20"], os.environ, failed)
    assert time.monotonic() - begun < 10


def test_ranks_that_fail_with_the_others_say_it_themselves() -> None:
    assert call(["sh", "-c", "sleep 0.3; exit 7"], os.environ, failed) == 7


def test_a_place_where_nobody_can_meet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        launch = Launch(nodes=2, address="127.0.0.1", port=taken.getsockname()[1])
        with pytest.raises(UsageError, match=r"can't meet at 127\.0\.0\.1.*MASTER_PORT to a free port"):
            RankCoordinator(launch)
