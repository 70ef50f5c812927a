"""The devices that a run uses, as options of every script."""

import dataclasses

from rl_jax.run.spmd import use_mesh


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a run is laid over. Its results do not depend on it, so that a resumed run may change it."""

    mesh: str = ""
    """Devices along each axis, such as data=4,fsdp=2,tensor=1; what is left out is 1, but data takes the rest."""


def use_machine(machine: Machine) -> None:
    """Sets up this process for a machine. Raises InputError where its devices cannot be laid out so."""
    use_mesh(machine.mesh)
