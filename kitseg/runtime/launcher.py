"""How a training was started, once or several times, and which of these processes this is."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from kitseg.errors import UsageError
from kitseg.runtime.device import Machine

STARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")  # how often it was queued or started again
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def is_started_again() -> bool:
    """Whether SLURM or torchrun has started this very command before."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in STARTS)


@dataclass(frozen=True)
class Launch:
    """One of the processes that torchrun, srun or the user started for the same training.

    node, local: the machine's number and the process's on it; nodes, per_node: how many there are of each; address,
    port: where all of them meet; agent: whether torchrun keeps that place open.
    """

    node: int = 0
    local: int = 0
    nodes: int = 1
    per_node: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    agent: bool = False

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
        """What the environment says: torchrun's, srun's, or NODE_RANK and MASTER_ADDR set by hand for several nodes.

        Raises:
            UsageError: it lacks something, or says what can't be.
        """
        try:
            if "TORCHELASTIC_RUN_ID" in os.environ:
                agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
                return replace(cls._read(TorchElasticEnvironment(), "LOCAL_WORLD_SIZE", "WORLD_SIZE"), agent=agent)
            if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun alone; SLURM_NTASKS by sbatch, too
                if "SLURM_NTASKS_PER_NODE" not in os.environ:
                    raise UsageError("srun needs --ntasks-per-node (a task a GPU, or one a machine)")
                return cls._read(SLURMEnvironment(auto_requeue=False), "SLURM_NTASKS_PER_NODE", "SLURM_NTASKS")
            return cls() if nodes == 1 else cls._by_hand(nodes)
        except (KeyError, ValueError, RuntimeError) as error:
            problem = "don't fit together, or one is missing"
            raise UsageError(f"the launcher's environment variables {problem}: {error}") from error

    @classmethod
    def _read(cls, cluster: ClusterEnvironment, per_node: str, of: str) -> Launch:
        here, all_ = int(os.environ[per_node]), int(os.environ[of])
        if all_ % here:
            raise ValueError(f"{all_} processes, {here} on each machine")
        return cls(
            cluster.node_rank(), cluster.local_rank(), all_ // here, here, cluster.main_address, cluster.main_port
        )

    @classmethod
    def _by_hand(cls, nodes: int) -> Launch:
        missing = [key for key in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
        if missing:
            raise UsageError(
                f"--nodes {nodes} needs torchrun, srun, or in the environment NODE_RANK (0 to {nodes - 1}), "
                f"MASTER_ADDR and MASTER_PORT (where machine 0 can be reached); {' and '.join(missing)} not set"
            )
        cluster = LightningEnvironment()
        if not 0 <= cluster.node_rank() < nodes:
            raise ValueError(f"NODE_RANK {cluster.node_rank()} of {nodes} nodes")
        return cls(cluster.node_rank(), 0, nodes, 1, cluster.main_address, cluster.main_port)

    def agreed(self, asked: Machine) -> Machine:
        """The machine asked for, with as many ranks and nodes as were started; one process a node starts its own ranks.

        Raises:
            UsageError: the two contradict each other.
        """
        ranks = asked.ranks if self.per_node == 1 else self.per_node
        for what, wanted, there in (("ranks", asked.ranks, ranks), ("nodes", asked.nodes, self.nodes)):
            if wanted not in (1, there):
                raise UsageError(
                    f"{wanted} {what} asked for, the launcher started {self.per_node} process(es) on each of "
                    f"{self.nodes} node(s): make them agree, or leave --gpus, --processes and --nodes to the launcher"
                )
        return replace(asked, ranks=ranks, nodes=self.nodes)

    def environment(self, port: int) -> dict[str, str]:
        """What the ranks of one fit are told, all of which meet at ``port``.

        Without LOCAL_RANK Lightning starts the ranks of the machine, and chooses a port where there is one machine.
        """
        told = {key: value for key, value in os.environ.items() if key not in OF_A_RANK}
        if self.of > 1:
            told |= {"NODE_RANK": str(self.node), "MASTER_ADDR": self.address, "MASTER_PORT": str(port)}
            told["TORCHELASTIC_USE_AGENT_STORE"] = str(False)
        if self.per_node > 1:
            told |= {"RANK": str(self.index), "LOCAL_RANK": str(self.local)}
        return told
