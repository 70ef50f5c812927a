"""What a policy says of tokens that exist already: the learner's side of the rollout.

Letters: B sequences, C completion length, D width, V vocabulary, T columns.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rl_jax.models.config import TransformerConfig
from rl_jax.models.transformer import hidden_states, logits, seen_states, values
from rl_jax.packing import Packing, by_group, from_rows, pack, sum_over_rows, to_rows
from rl_jax.reinforce.distributions import entropy, exact_kl, token_logprobs
from rl_jax.reinforce.gradient import ScoreFn, Scores
from rl_jax.run.spmd import traced_batch_parts, traced_platform
from rl_jax.sampling import Sampling, untruncated, warp_logits
from rl_jax.types import Array, PyTree, Rollout

CHUNK_BYTES = {"cpu": 1 << 25}  # of logits at once on a device: at twice this size XLA begins to write to fresh pages
MANY_BYTES = 1 << 28  # elsewhere: of 1,365 tokens with a vocabulary of 49,152; a gradient holds a few times as much


class Reference(NamedTuple):
    """The frozen policy that divergences are measured from: its parameters, and its states on a rollout.

    Attributes:
        params: the reference policy's parameters.
        states: from `completion_states`. [B, C, D].
    """

    params: PyTree
    states: Array


def completion_states(params: PyTree, rollout: Rollout, config: TransformerConfig) -> Array:
    """The states that predict each completion token. [B, C, D].

    The shift by one is here, for packed rows in `packing.pack`, and nowhere else.
    """
    tokens = jnp.concatenate([rollout.prompts, rollout.completions], axis=1)[:, :-1]
    mask = jnp.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)[:, :-1]
    return hidden_states(params, tokens, mask, config)[:, rollout.prompts.shape[1] - 1 :]


def token_scores(
    params: PyTree,
    states: Array,
    tokens: Array,
    config: TransformerConfig,
    sampling: Sampling,
    reference: Reference | None = None,
) -> Scores:
    """Scores of tokens from the states that predict them; logits [B, C, V] are never held.

    The columns go through the vocabulary in chunks, of as many logits as suits a device, which the backward pass makes
    again.

    Args:
        params: the policy's parameters.
        states: [B, C, D].
        tokens: int32 [B, C].
        config: the policy's configuration, and the reference's.
        sampling: temperature and filters.
        reference: what the KL is measured from.

    Returns:
        Scores of [B, C].
    """
    chex.assert_rank([states, tokens], [3, 2])
    chex.assert_equal_shape_prefix([states, tokens], 2)
    columns = tokens.shape[1]
    width = _columns_at_once(tokens.shape, config.vocab_size)
    ref_params, ref_states = reference or (None, None)

    def score(chunk: tuple[Array, Array, Array | None]) -> Scores:
        states, tokens, ref_states = chunk
        # [B C, V]: XLA on CPU shares work among threads along the first axis alone.
        scores = logits(params, states, config).reshape(-1, config.vocab_size)
        tempered = warp_logits(scores, untruncated(sampling))
        kl = jnp.zeros(tokens.size)
        if ref_states is not None:
            ref_scores = logits(ref_params, ref_states, config).reshape(scores.shape)
            kl = exact_kl(tempered, warp_logits(ref_scores, untruncated(sampling)))
        flat = tokens.reshape(-1)
        scored = Scores(token_logprobs(warp_logits(scores, sampling, flat), flat), entropy(tempered), kl)
        return jax.tree.map(lambda x: x.reshape(tokens.shape), scored)

    batch = (states, tokens, ref_states)
    if width == columns:
        return score(batch)
    parts = jax.tree.map(lambda x: _split_columns(x, width), batch)
    scored = jax.lax.map(jax.checkpoint(score), parts)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :columns], scored)


def score_completions(
    params: PyTree,
    rollout: Rollout,
    config: TransformerConfig,
    sampling: Sampling,
    reference: Reference | None = None,
    packing: Packing | None = None,
) -> Scores:
    """`token_scores` of a rollout's completions, and what a critic says of them; 0 where they are masked.

    With a packing the same without the padding, of sequences that fit into one part of it.
    """
    states, to, back = _laid_out(params, rollout, config, packing)
    if reference is not None:
        reference = reference._replace(states=to(reference.states))
    scores = token_scores(params, states, to(rollout.completions), config, sampling, reference)
    return jax.tree.map(back, scores._replace(values=values(params, states)))


def completion_logprobs(params: PyTree, rollout: Rollout, config: TransformerConfig, sampling: Sampling) -> Array:
    """Log-probability of each completion token under the distribution that `sampling` makes of the policy.

    Args:
        params: the policy's parameters.
        rollout: B sequences.
        config: the policy's configuration.
        sampling: temperature and filters; those that sampled the rollout, to compare with `behavior_logprobs`.

    Returns:
        float32 [B, C], 0 where masked.
    """
    return score_completions(params, rollout, config, sampling).logprobs


def reference_scores(
    ref_params: PyTree,
    rollout: Rollout,
    config: TransformerConfig,
    sampling: Sampling,
    packing: Packing | None = None,
) -> tuple[Array, Array]:
    """What the reference policy says of a rollout, once for all the updates made from it.

    Args:
        ref_params: the reference policy's parameters.
        rollout: B sequences.
        config: its configuration.
        sampling: how the rollout was sampled; the reference has its temperature, without its filters.
        packing: works through it in the parts that `sum_over_rows` makes, without the padding.

    Returns:
        Log-probabilities, 0 where masked [B, C], and states [B, C, D]: the context of `make_score_fn`'s function.
    """

    def score(part: Rollout) -> tuple[tuple[()], tuple[Array, Array]]:
        states, to, back = _laid_out(ref_params, part, config, packing)
        tokens = to(part.completions)
        logprobs = token_scores(ref_params, states, tokens, config, untruncated(sampling)).logprobs
        return (), (back(logprobs), states if packing is None else back(states))

    return (score(rollout) if packing is None else sum_over_rows(score, rollout, packing))[1]


def make_score_fn(
    ref_params: PyTree, config: TransformerConfig, sampling: Sampling, packing: Packing | None = None
) -> ScoreFn:
    """The scores that the policy gradient asks for, of a Transformer beside a reference of the same configuration.

    With a packing they are for the parts that `sum_over_rows` makes with the same one.
    """

    def score(ref_params: PyTree, params: PyTree, rollout: Rollout, ref_states: Array) -> Scores:
        return score_completions(params, rollout, config, sampling, Reference(ref_params, ref_states), packing)

    return Partial(score, ref_params)


def _laid_out(
    params: PyTree, rollout: Rollout, config: TransformerConfig, packing: Packing | None
) -> tuple[Array, Callable[[Array], Array], Callable[[Array], Array]]:
    """The states that predict completion tokens, in rows [R, W, D] where there is a packing, else [B, C, D]; the way of
    what is known of tokens, [B, C, ...], to where these states are; and the way back, where what is masked is 0."""
    mask = rollout.completion_mask
    if packing is None:
        return completion_states(params, rollout, config), lambda x: x, lambda x: jnp.where(mask, x, 0.0)
    rows = by_group(functools.partial(pack, packing=packing), packing.groups)(rollout)
    to, back = by_group(to_rows, packing.groups), by_group(from_rows, packing.groups)
    states = seen_states(params, rows.tokens, rows.positions, rows.seen, config)
    return states, lambda x: to(x, rows), lambda x: back(x, rows, mask)


def _columns_at_once(shape: tuple[int, ...], vocab_size: int) -> int:
    """Columns of tokens [B, C] whose logits a device holds at once: it has its own part of the rows."""
    rows, columns = shape
    room = CHUNK_BYTES.get(traced_platform(), MANY_BYTES)
    chunks = -(-4 * rows * columns * vocab_size // (traced_batch_parts() * room))
    return -(-columns // min(chunks, columns))


def _split_columns(x: Array, width: int) -> Array:
    """[B, C, ...] -> [C / width, B, width, ...], padded with zeros to whole chunks."""
    padding = [(0, 0), (0, -x.shape[1] % width)] + [(0, 0)] * (x.ndim - 2)
    return jnp.moveaxis(jnp.pad(x, padding).reshape(x.shape[0], -1, width, *x.shape[2:]), 1, 0)
