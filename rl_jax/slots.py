"""Prompts to completions in slots that refill: continuous batching inside one compiled program.

Completions differ in length, and a batch waits for its longest. Here a fixed number of slots works through a queue of
sequences: a slot whose completion has ended takes the next sequence, and when the queue is empty and few slots are at
work, these go on alone, in a smaller batch. The host is never asked.

Letters: N prompts, G completions of each, B = N * G sequences, S slots, P prompt length, C completion length.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from rl_jax.models.config import TransformerConfig
from rl_jax.models.ring import Ring, empty_ring, ring_step, take_prompts, take_slots
from rl_jax.models.transformer import Pairs, logits, prefill
from rl_jax.rollout import check_lengths, compute_params, sample_tokens, sequence_uniforms
from rl_jax.sampling import Sampling
from rl_jax.types import Array, PyTree, Rollout

SHRINK = 4  # the batch becomes so many times smaller when no more slots than that are at work
FEWEST = 4  # slots that it is worth compiling a smaller batch for


class _Queue(NamedTuple):
    """What there is to do, the sequences in their order.

    Attributes:
        prompts: keys and values of the prompts, for each layer. [N, J, P, K].
        prompt_mask: bool [N, P].
        first: the first token of each sequence, and its log-probability. [B].
        uniforms: what its tokens are drawn with. [B, C].
    """

    prompts: Pairs
    prompt_mask: Array
    first: tuple[Array, Array]
    uniforms: Array


class _Slots(NamedTuple):
    """The loop's carry: what the slots are at, the log of what each has sampled, and where in it a sequence stands.

    Attributes:
        step: steps so far. [].
        taken: sequences that have left the queue. [].
        ring: the slots' cache.
        sequences: the one that each slot is at. int32 [S].
        ages: tokens of it that have been sampled; 0 where the slot is idle. int32 [S].
        tokens: the last of these. int32 [S].
        log: what each slot sampled at each step, tokens and log-probabilities. [steps, S at first].
        began: the step at which each sequence began. int32 [B].
        column: of the log, that holds each sequence. int32 [B].
    """

    step: Array
    taken: Array
    ring: Ring
    sequences: Array
    ages: Array
    tokens: Array
    log: tuple[Array, Array]
    began: Array
    column: Array


def generate_in_slots(
    params: PyTree,
    key: Array,
    prompts: Array,
    prompt_mask: Array,
    config: TransformerConfig,
    sampling: Sampling,
    index: Array | None = None,
    slots: int = 0,
) -> Rollout:
    """Sample a group of completions for each prompt: token for token those of `rollout.generate`.

    The other arguments, shapes and errors are as there.

    Args:
        slots: S, sequences at work at once; 0 for all of them. Fewer take less memory.
    """
    chex.assert_rank([prompts, prompt_mask], 2)
    chex.assert_equal_shape([prompts, prompt_mask])
    check_lengths(prompts.shape[1], sampling, config)
    index = jnp.arange(prompts.shape[0]) if index is None else index
    uniforms = sequence_uniforms(key, index, sampling)
    rows = len(uniforms)
    slots = min(slots or rows, rows)
    params = compute_params(params, config)

    states, cache = prefill(params, prompts, prompt_mask, config, prompts.shape[1])
    scores = jnp.repeat(logits(params, states, config), sampling.group_size, axis=0)
    queue = _Queue(cache.pairs, prompt_mask, sample_tokens(scores, uniforms[:, 0], sampling), uniforms)
    refill = functools.partial(_refill, queue=queue, sampling=sampling)
    advance = functools.partial(_advance, queue=queue, params=params, config=config, sampling=sampling)

    stages = [slots]
    while not sampling.ignore_eos and sampling.eos and stages[-1] >= SHRINK * FEWEST:
        stages.append(stages[-1] // SHRINK)
    carry = _idle(queue, slots, sampling.length)
    for size, enough in zip(stages, [*stages[1:], 0], strict=True):
        carry = _run(carry if size == slots else _shrink(carry, size), rows, enough, refill, advance)

    completions, logprobs = _read_log(carry, queue, sampling.length)
    stopped = _is_stop(completions, sampling)
    mask = jnp.cumsum(stopped, axis=1) - stopped == 0
    return Rollout(
        prompts=jnp.repeat(prompts, sampling.group_size, axis=0),
        prompt_mask=jnp.repeat(prompt_mask, sampling.group_size, axis=0),
        completions=jnp.where(mask, completions, 0),
        completion_mask=mask,
        behavior_logprobs=jnp.where(mask, logprobs, 0.0),
        truncated=~jnp.any(stopped & mask, axis=1),
    )


def _is_stop(tokens: Array, sampling: Sampling) -> Array:
    """Whether tokens [...] end a completion. bool [...]."""
    stops = jnp.array(() if sampling.ignore_eos else sampling.eos, jnp.int32)
    return jnp.any(tokens[..., None] == stops.reshape(*[1] * tokens.ndim, -1), axis=-1)


def _ages_after(tokens: Array, ages: Array, sampling: Sampling) -> Array:
    """Ages of slots that have just sampled these tokens, of these numbers in their completions: 0 where these end."""
    return jnp.where(_is_stop(tokens, sampling) | (ages >= sampling.length), 0, ages)


def _idle(queue: _Queue, slots: int, length: int) -> _Slots:
    """Slots before anything is done."""
    rows = len(queue.uniforms)
    steps = max(length - 1, 1) * -(-rows // slots)  # as many as where no completion ends early
    none = jnp.zeros(slots, jnp.int32)
    return _Slots(
        step=jnp.int32(0),
        taken=jnp.int32(0),
        ring=empty_ring(queue.prompts, slots, length),
        sequences=none,
        ages=none,
        tokens=none,
        log=(jnp.zeros((steps, slots), jnp.int32), jnp.zeros((steps, slots))),
        began=jnp.zeros(rows, jnp.int32),
        column=jnp.zeros(rows, jnp.int32),
    )


def _run(
    carry: _Slots, rows: int, enough: int, refill: Callable[[_Slots], _Slots], advance: Callable[[_Slots], _Slots]
) -> _Slots:
    """Goes on until the queue of so many sequences is empty and no more than `enough` slots are at work."""

    def due(carry: _Slots) -> Array:
        return (carry.taken < rows) | (jnp.sum(carry.ages > 0) > enough)

    def steady(carry: _Slots) -> Array:
        """Whether there is nothing to do but to sample: some slots are at work, and no idle one could take more."""
        return due(carry) & jnp.any(carry.ages > 0) & ~((carry.taken < rows) & jnp.any(carry.ages == 0))

    return jax.lax.while_loop(due, lambda carry: jax.lax.while_loop(steady, advance, refill(carry)), carry)


def _refill(carry: _Slots, queue: _Queue, sampling: Sampling) -> _Slots:
    """Idle slots take the next sequences."""
    rows = len(queue.uniforms)
    idle = carry.ages == 0
    candidates = carry.taken + jnp.cumsum(idle, dtype=jnp.int32) - 1
    fresh = idle & (candidates < rows)
    sequences = jnp.where(fresh, candidates, carry.sequences)
    tokens = jnp.where(fresh, queue.first[0][sequences], carry.tokens)
    taken_by = fresh[None, :] & (sequences[None, :] == jnp.arange(rows)[:, None])
    taken = jnp.any(taken_by, axis=1)
    prompts = sequences // sampling.group_size
    return carry._replace(
        taken=carry.taken + jnp.sum(fresh, dtype=jnp.int32),
        ring=take_prompts(carry.ring, queue.prompts, queue.prompt_mask, prompts, fresh),
        sequences=sequences,
        ages=jnp.where(fresh, _ages_after(tokens, jnp.int32(1), sampling), carry.ages),
        tokens=tokens,
        began=jnp.where(taken, carry.step, carry.began),
        column=jnp.where(taken, jnp.argmax(taken_by, axis=1).astype(jnp.int32), carry.column),
    )


def _advance(carry: _Slots, queue: _Queue, params: PyTree, config: TransformerConfig, sampling: Sampling) -> _Slots:
    """Every slot samples a token; what an idle one samples, nothing reads."""
    states, ring = ring_step(params, carry.ring, carry.tokens, carry.step, carry.ages, config)
    uniform = queue.uniforms[carry.sequences, carry.ages]
    sampled = sample_tokens(logits(params, states, config), uniform, sampling)
    ages = jnp.where(carry.ages > 0, carry.ages + 1, 0)
    return carry._replace(
        step=carry.step + 1,
        ring=ring,
        ages=_ages_after(sampled[0], ages, sampling),
        tokens=sampled[0],
        log=jax.tree.map(
            lambda log, new: jax.lax.dynamic_update_slice(log, new[None], (carry.step, 0)), carry.log, sampled
        ),
    )


def _shrink(carry: _Slots, size: int) -> _Slots:
    """The slots at work, at most `size` of them, in a batch of that many. Columns of the log move with them."""
    order = jnp.argsort(carry.ages == 0, stable=True)
    rest = jnp.arange(len(order), carry.log[0].shape[1])
    columns = jnp.concatenate([order, rest])
    chosen = order[:size]
    return carry._replace(
        ring=take_slots(carry.ring, chosen),
        sequences=carry.sequences[chosen],
        ages=carry.ages[chosen],
        tokens=carry.tokens[chosen],
        log=jax.tree.map(lambda log: log[:, columns], carry.log),
        column=jnp.argsort(columns)[carry.column].astype(jnp.int32),
    )


def _read_log(carry: _Slots, queue: _Queue, length: int) -> tuple[Array, Array]:
    """Tokens and log-probabilities of every sequence, which past its end are anything. [B, C]."""
    steps = carry.began[:, None] + jnp.arange(length - 1)[None, :]
    later = (log[jnp.minimum(steps, len(log) - 1), carry.column[:, None]] for log in carry.log)
    tokens, logprobs = (
        jnp.concatenate([first[:, None], rest], axis=1) for first, rest in zip(queue.first, later, strict=True)
    )
    return tokens, logprobs
