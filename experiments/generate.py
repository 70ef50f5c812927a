"""Complete prompts with a policy.

    python experiments/generate.py --policy runs/pipeline/policy --prompts "And the king" "In that day"
    python experiments/generate.py --policy runs/pipeline/policy

Without prompts it asks for them, one after another.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.text import Text

from rl_jax.data.prompts import decode_completions, encode_prompts
from rl_jax.errors import InputError
from rl_jax.keys import Purpose, check_seed, step_key
from rl_jax.models.huggingface import load_policy
from rl_jax.models.layout import put_model
from rl_jax.rollout import generate
from rl_jax.run.loop import run_main
from rl_jax.run.machine import Machine
from rl_jax.run.processes import are_several
from rl_jax.run.spmd import AS_IT_IS, make_mesh, pmapped
from rl_jax.sampling import Sampling
from rl_jax.types import Array, PyTree, Rollout


@dataclasses.dataclass(frozen=True)
class Config:
    """Complete prompts with a policy."""

    policy: Path
    """Folder of the policy: config.json, model.safetensors and tokenizer."""
    prompts: tuple[str, ...] = ()
    """Prompts to complete; without any, they are read from the terminal until it ends."""
    completions: int = 1
    """Completions of each prompt."""
    length: int = 64
    """Most tokens of a completion."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token each time."""
    top_k: int = 0
    """Sample among this many of the likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the fewest tokens that have this probability together; 1 means all."""
    min_p: float = 0.0
    """Sample among tokens with at least this share of the highest probability; 0 means all."""
    ignore_eos: bool = False
    """Go on to the full length where the policy would end."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What activations are computed in."""
    seed: int = 0
    """Seed of the samples; prompts typed one after another get new ones."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()


def main(config: Config) -> None:
    check_seed(config.seed)
    if config.completions < 1 or config.length < 1:
        raise InputError(f"completions is {config.completions} and length {config.length}; both must be at least 1.")
    if are_several():
        raise InputError("This script runs in one process: leave out coordinator.")
    policy = load_policy(config.policy, config.dtype)
    tokenizer, mesh, console = policy.tokenizer, make_mesh(), Console()
    sampling = Sampling(
        length=config.length,
        group_size=config.completions,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        eos=policy.ends,
        ignore_eos=config.ignore_eos,
    )
    room = policy.config.context - config.length
    if room < 1:
        raise InputError(
            f"A completion of {config.length} tokens leaves no room for a prompt in a context of "
            f"{policy.config.context}: give a shorter length."
        )
    params = put_model(policy.params, mesh)

    def sample(params: PyTree, key: Array, prompts: Array, mask: Array) -> Rollout:
        return generate(params, key, prompts, mask, policy.config, sampling)

    sample_on_device = pmapped(sample, mesh, (AS_IT_IS, None, None, None), None)

    def complete(texts: tuple[str, ...], turn: int) -> None:
        prompts, mask = encode_prompts(tokenizer, texts, policy.config.context, config.length)
        if not config.prompts:  # every turn has the same shape, so that none compiles again
            prompts, mask = (np.pad(x, ((0, 0), (room - x.shape[1], 0))) for x in (prompts, mask))
        rollout = sample_on_device(params, step_key(config.seed, Purpose.SAMPLE, turn), prompts, mask)
        completions = decode_completions(tokenizer, rollout.completions, rollout.completion_mask)
        for row, completion in enumerate(completions):
            console.print(Text(texts[row // config.completions], style="dim") + Text(completion), "\n", sep="")

    if config.prompts:
        complete(config.prompts, 0)
    for turn, text in enumerate(typed(console) if not config.prompts else ()):
        try:
            complete((text,), turn)
        except InputError as error:
            console.print(f"error: {error}", style="red", markup=False)


def typed(console: Console) -> Iterator[str]:
    """Prompts from the terminal, until it ends."""
    while True:
        try:
            yield console.input("[bold]prompt> [/]")
        except EOFError:
            return


if __name__ == "__main__":
    run_main(main, Config)
