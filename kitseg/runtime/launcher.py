"""How this process was started: alone, or with others by torchrun, srun or by hand."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kitseg.errors import UsageError

if TYPE_CHECKING:
    from kitseg.runtime.device import Machine

STARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # how often it was queued or started again
LAUNCHERS = (  # srun's second is not SLURM_NTASKS, which a batch script has, too, that runs on its own
    ("RANK", "WORLD_SIZE"),  # torchrun
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # srun
)


def is_started_again() -> bool:
    """Whether SLURM or torchrun has started this very command before."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in STARTS)


def position() -> tuple[int, int]:
    """This process's number and the number of processes under torchrun or srun; (0, 1) elsewhere."""
    for names in LAUNCHERS:
        if all(name in os.environ for name in names):
            index, of = (os.environ[name].strip() for name in names)
            if not (index.isdecimal() and of.isdecimal() and int(index) < int(of)):
                values = " and ".join(f"{name}={os.environ[name]!r}" for name in names)
                raise UsageError(f"{values} in the environment are not a rank and a number of ranks: unset or fix them")
            return int(index), int(of)
    return 0, 1


def described() -> str:
    """The environment's variables by which this process is one of several; empty where it is alone."""
    for names in LAUNCHERS:
        if position()[1] > 1 and all(name in os.environ for name in names):
            return " and ".join(f"{name}={os.environ[name]}" for name in names)
    return ""


def rank() -> int:
    """This process's number among all that the launcher started."""
    return position()[0]


def local_rank() -> int:
    """This process's number among those of its machine."""
    return _number("LOCAL_RANK", _number("SLURM_LOCALID", 0))


def gpu_index(count: int) -> int:
    """Which of the GPUs that this process sees is its own; srun may show each process its own only."""
    index = local_rank() if "LOCAL_RANK" in os.environ else local_rank() % count
    if index >= count:
        raise UsageError(f"{index + 1} GPU(s) requested, but torch finds {count} here; choose fewer, or --device cpu")
    return index


@dataclass(frozen=True)
class Launch:
    """One of the processes that train together.

    node, local: the machine's number and the process's on it; nodes, per_node: how many there are of each; address,
    port: where all of them meet; agent: whether torchrun keeps that place open; started: whether the other processes
    of this machine are there already, or this one starts them.
    """

    node: int = 0
    local: int = 0
    nodes: int = 1
    per_node: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    agent: bool = False
    started: bool = True

    @property
    def index(self) -> int:
        """This process's number; 0 decides what is done."""
        return self.node * self.per_node + self.local

    @property
    def of(self) -> int:
        """The number of processes."""
        return self.nodes * self.per_node

    @classmethod
    def here(cls, nodes: int) -> Launch:
        """The environment's: torchrun's, srun's, or NODE_RANK and MASTER_ADDR set by hand for several nodes."""
        try:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
                place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                return cls._of(("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"), *place, agent)
            if _number("SLURM_STEP_NUM_TASKS", 1) > 1:  # set by srun alone; SLURM_NTASKS by sbatch, too
                if "SLURM_NTASKS_PER_NODE" not in os.environ:
                    raise UsageError("srun needs --ntasks-per-node (a task a GPU, or one a machine)")
                names = ("SLURM_NODEID", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE", "SLURM_NTASKS")
                return cls._of(names, *_first_node_of_slurm())
            return cls() if nodes == 1 else cls._by_hand(nodes)
        except (KeyError, ValueError, RuntimeError) as error:
            problem = "contradict each other, or one is missing"
            raise UsageError(f"the launcher's environment variables {problem}: {error}") from error

    @classmethod
    def _of(cls, names: tuple[str, str, str, str], address: str, port: int, agent: bool = False) -> Launch:
        node, local, here, all_ = (int(os.environ[name]) for name in names)
        if all_ % here:
            raise ValueError(f"{all_} processes, {here} on each machine")
        return cls(node, local, all_ // here, here, address, port, agent)

    @classmethod
    def _by_hand(cls, nodes: int) -> Launch:
        missing = [key for key in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
        if missing:
            raise UsageError(
                f"--nodes {nodes} needs torchrun, srun, or in the environment NODE_RANK (0 to {nodes - 1}), "
                f"MASTER_ADDR and MASTER_PORT (where machine 0 can be reached); {' and '.join(missing)} not set"
            )
        node = int(os.environ["NODE_RANK"])
        if not 0 <= node < nodes:
            raise ValueError(f"NODE_RANK {node} of {nodes} nodes")
        return cls(node, 0, nodes, 1, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))

    def agreed(self, asked: Machine) -> tuple[Launch, Machine]:
        """The processes that train, and the machine asked for with as many ranks and nodes.

        Where one process a node was started, it starts the other ranks of its node.
        """
        ranks = asked.ranks if self.per_node == 1 else self.per_node
        for what, wanted, there in (("ranks", asked.ranks, ranks), ("nodes", asked.nodes, self.nodes)):
            if wanted not in (1, there):
                raise UsageError(
                    f"{wanted} {what} asked for, the launcher started {self.per_node} process(es) on each of "
                    f"{self.nodes} node(s): make them agree, or leave --gpus, --processes and --nodes to the launcher"
                )
        launch = replace(self, per_node=ranks, started=self.per_node == ranks)
        return launch, replace(asked, ranks=ranks, nodes=self.nodes, node=self.node, local=self.local)

    def environment(self, local: int, port: int) -> dict[str, str]:
        """What a process that this one starts on its machine finds in its environment: torchrun's variables."""
        numbers = {"RANK": self.node * self.per_node + local, "LOCAL_RANK": local, "GROUP_RANK": self.node}
        sizes = {"WORLD_SIZE": self.of, "LOCAL_WORLD_SIZE": self.per_node, "MASTER_PORT": port}
        texts = {"MASTER_ADDR": self.address, "TORCHELASTIC_RUN_ID": "kitseg", "TORCHELASTIC_USE_AGENT_STORE": "False"}
        texts["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # or PyTorch prints a C++ stack where the first process is killed
        return {**os.environ, **{key: str(value) for key, value in {**numbers, **sizes, **texts}.items()}}


def _first_node_of_slurm() -> tuple[str, int]:
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    cluster = SLURMEnvironment(auto_requeue=False)
    return cluster.main_address, cluster.main_port


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.strip().isdecimal():
        raise UsageError(f"{name}={text!r} in the environment is not a number: unset or fix it")
    return int(text)
