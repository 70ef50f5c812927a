"""A reply as its tokens are sampled, and the tokens of a conversation, whose turns are read once and never again."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rl_jax.data.conversations import BrokenRow, Message, Render
from rl_jax.data.tokenizer import encode_texts
from rl_jax.errors import InputError
from rl_jax.models.huggingface import Policy
from rl_jax.models.reading import empty_cache, read_tokens
from rl_jax.models.transformer import Pairs, logits
from rl_jax.rollout import compute_params, sample_tokens
from rl_jax.run.spmd import AS_IT_IS, Mesh, pmapped, put
from rl_jax.sampling import Sampling
from rl_jax.types import Array, PyTree

CHUNK = 32  # tokens of a prompt that are read at once


class Memory(NamedTuple):
    """What has been read: tokens, and their keys and values, which the next reply takes over."""

    tokens: tuple[int, ...]
    cache: Pairs


StreamFn = Callable[[Memory, Sequence[int], np.ndarray], Iterator[tuple[int, Memory]]]
"""What has been read, a prompt, uniform numbers [C] to draw its completion with -> each of its tokens as it is sampled,
the one that ends it too, and what has been read by then. Of a prompt that begins with what has been read only the rest
is read."""


def make_stream(
    policy: Policy, params: PyTree, sampling: Sampling, columns: int, mesh: Mesh
) -> tuple[StreamFn, Memory]:
    """Compiles what a reply takes, and gives it with an empty memory.

    Args:
        policy: whose configuration and tokenizer; tokens that the tokenizer does not have are never sampled.
        params: its parameters, on the devices.
        sampling: as for `rollout.generate`, which gives the same tokens for the same uniform numbers.
        columns: most tokens of a prompt and its completion together.
        mesh: the devices.
    """
    known = np.zeros((1, policy.config.vocab_size), bool)
    known[0, list(policy.tokenizer.get_vocab().values())] = True
    stops = () if sampling.ignore_eos else sampling.eos

    def read(
        params: PyTree, cache: Pairs, tokens: Array, index: Array, last: Array, uniform: Array
    ) -> tuple[Array, Pairs]:
        states, cache = read_tokens(params, cache, tokens, index, policy.config)
        scores = logits(params, jnp.take(states, last, axis=1), policy.config)
        return sample_tokens(jnp.where(known, scores, -jnp.inf), uniform[None], sampling)[0], cache

    cast = pmapped(lambda params: compute_params(params, policy.config), mesh, (AS_IT_IS,), None)
    run = pmapped(read, mesh, (AS_IT_IS, *[None] * 5), None, donate=(1,))
    params = cast(params) if policy.config.dtype != "float32" else params
    cache = put(empty_cache(policy.config, 1, columns + CHUNK), mesh)

    def advance(cache: Pairs, ids: Sequence[int], size: int, index: int, uniform: float) -> tuple[Array, Pairs]:
        tokens = np.zeros((1, size), np.int32)
        tokens[0, : len(ids)] = ids
        return run(params, cache, tokens, np.int32(index), np.int32(len(ids) - 1), np.float32(uniform))

    def stream(memory: Memory, prompt: Sequence[int], uniforms: np.ndarray) -> Iterator[tuple[int, Memory]]:
        pairs = enumerate(zip(memory.tokens, prompt, strict=False))
        same = next((number for number, (old, new) in pairs if old != new), min(len(memory.tokens), len(prompt)))
        cache, token = memory.cache, jnp.zeros(1)
        for start in range(min(same, len(prompt) - 1), len(prompt), CHUNK):
            token, cache = advance(cache, prompt[start : start + CHUNK], CHUNK, start, uniforms[0])
        read = tuple(prompt)
        for uniform in (*uniforms[1:], None):
            sampled = int(np.asarray(token)[0])
            yield sampled, Memory(read, cache)
            if sampled in stops or uniform is None:
                return
            token, cache = advance(cache, [sampled], 1, len(read), uniform)
            read = (*read, sampled)

    for size in (CHUNK, 1):
        _, cache = advance(cache, [0], size, 0, 0.0)
    return stream, Memory((), cache)


class Conversation(NamedTuple):
    """Messages, and their text and tokens as far as these have been read or sampled."""

    messages: tuple[Message, ...]
    text: str = ""
    tokens: tuple[int, ...] = ()


def say(
    conversation: Conversation, message: str, render: Render, tokenizer: Any, room: int
) -> tuple[Conversation, bool]:
    """A conversation with a user's message after it, ready for the reply, and whether old turns had to be left out.

    What was sampled is not encoded again, unless the chat template changes earlier turns, or some are left out.

    Args:
        conversation: ends in a reply, if it has begun.
        message: what the user says.
        render: the chat template.
        tokenizer: encodes what it makes.
        room: most tokens.

    Raises:
        InputError: the message does not fit even alone.
    """
    messages = (*conversation.messages, {"role": "user", "content": message})
    text, tokens = conversation.text, conversation.tokens
    system = messages[:1] if messages[0]["role"] == "system" else ()
    turns = messages[len(system) :]
    left_out = False
    while True:
        whole = open_turn((*system, *turns), render)
        if left_out or not whole.startswith(text):
            text, tokens = "", ()
        new = encode_texts(tokenizer, [whole[len(text) :]])[0]
        if len(tokens) + len(new) <= room:
            return Conversation((*system, *turns), whole, (*tokens, *new.tolist())), left_out
        if len(turns) == 1:
            raise InputError(f"The message has {len(new)} tokens with its template; there is room for {room}.")
        turns, left_out = turns[2:], True


def open_turn(messages: Sequence[Message], render: Render) -> str:
    """The text that the assistant's turn follows; InputError where the chat template refuses the messages."""
    try:
        return render(messages, True)
    except BrokenRow as error:
        raise InputError(f"The conversation {error}") from error


def hear(conversation: Conversation, reply: Sequence[int], ends: Sequence[int], tokenizer: Any) -> Conversation:
    """A conversation with the reply to it, whose last token may be one that ends it."""
    said = reply[:-1] if reply and reply[-1] in ends else reply
    content, whole = (str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) for ids in (said, reply))
    return Conversation(
        (*conversation.messages, {"role": "assistant", "content": content}),
        conversation.text + whole,
        (*conversation.tokens, *reply),
    )
