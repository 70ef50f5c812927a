"""The devices that a run uses, as options of every script."""

import dataclasses

from rl_jax.run.processes import start_processes
from rl_jax.run.spmd import use_mesh


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run is laid over. Its results do not depend on it, so that a resumed run may change it."""

    mesh: str = ""
    """Devices along each axis, such as data=4,fsdp=2,tensor=1; what is left out is 1, but data takes the rest."""
    coordinator: str = ""
    """Several processes: where process 0 listens for the others, host:port; or auto, to take this and their numbers
    from the environment (SLURM, Open MPI, a slice of TPUs)."""
    processes: int = 0
    """Several processes: how many."""
    process: int = -1
    """Several processes: number of this one, from 0."""


def use_machine(machine: Machine) -> None:
    """Sets up this process for a machine. Raises InputError where its devices cannot be laid out so."""
    start_processes(machine.coordinator, machine.processes, machine.process)
    use_mesh(machine.mesh)
