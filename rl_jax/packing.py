"""Padding removed from an update: prompts and completions of any length packed into rows of one width.

A row holds sequences one after another. Where neighbours complete the same prompt, the row has that prompt once, up to
its last token: every sequence begins with its own copy of that one, so that each of its columns predicts one token.
Attention sees a token's own sequence and prompt alone, so the numbers are those of padded rows.

Letters: B sequences, P prompt length, C completion length, R rows, W columns of a row.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rl_jax.microbatch import Part
from rl_jax.run.spmd import traced_once
from rl_jax.types import Array, PyTree, Rollout


class Rows(NamedTuple):
    """Packed sequences.

    Attributes:
        tokens: int32 [R, W].
        positions: of each token in its sequence. int32 [R, W].
        seen: which columns of its row each token sees. bool [R, W, W].
        sequence: the sequence of whose completion each column predicts a token. int32 [R, W].
        index: of that token in the completion. int32 [R, W].
        predicts: whether it does; not on shared prompts, nor where a row is empty. bool [R, W].
        cells: where each completion token is predicted, row * W + column. int32 [B, C].
    """

    tokens: Array
    positions: Array
    seen: Array
    sequence: Array
    index: Array
    predicts: Array
    cells: Array


class Packing(NamedTuple):
    """How an update is packed.

    Attributes:
        rows: R, of a part of it, in each group.
        width: W, columns of a row.
        groups: neighbouring parts of the batch that are packed each by itself, as many as the devices that it is laid
            over, where these keep in step.
    """

    rows: int
    width: int
    groups: int = 1


class _Places(NamedTuple):
    """Where sequences are: their row, the column at which they or the prompt before them begin, and whether that
    prompt is there. [B] each."""

    row: Array
    begin: Array
    with_prompt: Array


def choose_packing(prompt_length: int, length: int, group_size: int, width: int, tokens: int) -> Packing:
    """Rows that hold any sequence, and more than one where sharing a long prompt is worth it.

    A row is one prompt and k completions of full length, for the k up to G that is cheapest: a token costs a block
    about 24 D^2 flops in matrix multiplications and 4 W D in attention.

    Args:
        prompt_length: P.
        length: C.
        group_size: G, completions of each prompt.
        width: D of the model.
        tokens: about as many in a part.
    """

    def cost(k: int) -> float:
        return ((prompt_length - 1) / k + length) * (6 * width + columns(k))

    def columns(k: int) -> int:
        return prompt_length - 1 + k * length

    columns_of_row = columns(min(range(1, group_size + 1), key=cost))
    return Packing(max(round(tokens / columns_of_row), 1), columns_of_row)


def pack(rollout: Rollout, packing: Packing) -> Rows:
    """Packs a rollout, in its order, into rows.

    Args:
        rollout: B sequences, some of which may be empty, that need no more rows than there are.
        packing: rows and their width, at least P - 1 + C.
    """
    rows, width = packing.rows, packing.width
    prompt_length, length = rollout.prompts.shape[1], rollout.completions.shape[1]
    numbers, prompts, lengths = _measure(rollout)
    places = _place(numbers, prompts, lengths, width)
    begins = places.row * width + places.begin
    prefix = jnp.where(places.with_prompt, prompts, 0)

    flat = jnp.arange(rows * width)
    owner = jnp.maximum(jnp.searchsorted(begins, flat, side="right", method="compare_all") - 1, 0)
    offset = flat - begins[owner]
    shared = offset < prefix[owner]
    index = offset - prefix[owner]
    predicts = (index >= 0) & (index < lengths[owner])
    text = jnp.concatenate([rollout.prompts, rollout.completions], axis=1)
    column = jnp.where(shared, prompt_length - 1 - prompts[owner] + offset, prompt_length - 1 + index)
    used = shared | predicts
    positions = jnp.where(used, jnp.where(shared, offset, prompts[owner] + index), 0)
    tokens = jnp.where(used, text[owner, jnp.clip(column, 0, text.shape[1] - 1)], 0)
    shape = (rows, width)
    prompt = jnp.where(used, numbers[owner], -1).reshape(shape)
    own = jnp.where(predicts, owner, -1).reshape(shape)
    positions = positions.reshape(shape)
    seen = (
        (prompt[:, :, None] == prompt[:, None, :])
        & ((own[:, :, None] == own[:, None, :]) | (own[:, None, :] == -1))
        & (positions[:, None, :] <= positions[:, :, None])
    )
    cells = (begins + prefix)[:, None] + jnp.arange(length)[None, :]
    return Rows(
        tokens=tokens.reshape(shape),
        positions=positions,
        seen=seen,
        sequence=owner.reshape(shape),
        index=jnp.clip(index, 0, length - 1).reshape(shape),
        predicts=predicts.reshape(shape),
        cells=jnp.clip(cells, 0, rows * width - 1),
    )


def by_group(fn: Callable[..., PyTree], groups: int) -> Callable[..., PyTree]:
    """`fn` of neighbouring parts of its arguments, each by itself: their first axes, and those of what it returns, are
    cut into so many parts."""
    if groups == 1:
        return fn

    def by_part(*args: PyTree) -> PyTree:
        parts = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), args)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(fn)(*parts))

    return by_part


def to_rows(values: Array, rows: Rows) -> Array:
    """What is known of completion tokens, where they are predicted; 0 elsewhere. [B, C, ...] -> [R, W, ...]."""
    found = values[rows.sequence, rows.index]
    return jnp.where(_like(rows.predicts, found), found, 0)


@jax.custom_vjp
def from_rows(values: Array, rows: Rows, mask: Array) -> Array:
    """Back to completion tokens; 0 where their mask [B, C], which was packed, is false. [R, W, ...] -> [B, C, ...].

    Its gradient is `to_rows`, a gather, where that of a gather would be a scatter, which is slow.
    """
    found = values.reshape(-1, *values.shape[2:])[rows.cells]
    return jnp.where(_like(mask, found), found, 0)


def _from_rows_forward(values: Array, rows: Rows, mask: Array) -> tuple[Array, Rows]:
    return from_rows(values, rows, mask), rows


def _from_rows_backward(rows: Rows, gradient: Array) -> tuple[Array, None, None]:
    return to_rows(gradient, rows), None, None


from_rows.defvjp(_from_rows_forward, _from_rows_backward)


def sum_over_rows(fn: Part, batch: PyTree, packing: Packing) -> tuple[PyTree, PyTree]:
    """As `sum_over_microbatches`, but a part is what packs into so many rows, and there are as many as that takes.

    `fn` is given the whole batch with the completions of the other parts masked, and what it returns for their
    sequences counts for nothing.

    Args:
        fn: what is made of a part. It packs what is not masked.
        batch: a pytree of arrays [B, ...] with a rollout in it. Its sequences are taken in order.
        packing: the rows of a part.

    Returns:
        As `sum_over_microbatches`.
    """

    def is_rollout(x: PyTree) -> bool:
        return isinstance(x, Rollout)

    rollout = next(filter(is_rollout, jax.tree.leaves(batch, is_leaf=is_rollout)))
    row = by_group(lambda part: _place(*_measure(part), packing.width).row, packing.groups)(rollout)
    parts = jnp.max(row) // packing.rows + 1

    @traced_once  # for the shapes, and in the loop
    def make_part(number: Array) -> tuple[PyTree, PyTree]:
        mask = rollout.completion_mask & (row // packing.rows == number)[:, None]

        def choose(x: PyTree) -> PyTree:
            return dataclasses.replace(x, completion_mask=mask) if is_rollout(x) else x

        return fn(jax.tree.map(choose, batch, is_leaf=is_rollout))

    def add(carry: tuple[Array, PyTree, PyTree]) -> tuple[Array, PyTree, PyTree]:
        number, sums, kept = carry
        more, made = make_part(number)
        member = row // packing.rows == number
        kept = jax.tree.map(lambda new, old: jnp.where(_like(member, new), new, old), made, kept)
        return number + 1, jax.tree.map(jnp.add, sums, more), kept

    shapes = jax.eval_shape(make_part, jnp.int32(0))
    sums, kept = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    _, sums, kept = jax.lax.while_loop(lambda carry: carry[0] < parts, add, (jnp.int32(0), sums, kept))
    return sums, kept


def _like(mask: Array, values: Array) -> Array:
    """A mask with trailing axes of 1, as many as it lacks of those of the values."""
    return mask.reshape(*mask.shape, *[1] * (values.ndim - mask.ndim))


def _measure(rollout: Rollout) -> tuple[Array, Array, Array]:
    """For each sequence the number of its prompt, where neighbours with the same prompt have the same number; tokens of
    the prompt but the last; tokens of the completion. int32 [B] each."""
    prompts, mask = rollout.prompts, rollout.prompt_mask
    differs = jnp.any((prompts[1:] != prompts[:-1]) | (mask[1:] != mask[:-1]), axis=1)
    numbers = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(differs, dtype=jnp.int32)])
    lengths = jnp.sum(rollout.completion_mask, axis=1, dtype=jnp.int32)
    return numbers, jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32) - 1, 0), lengths


def _place(numbers: Array, prompts: Array, lengths: Array, width: int) -> _Places:
    """Each sequence goes where the one before it ends, or where it has no room there, to the next row."""

    def place(carry: tuple[Array, Array, Array], sequence: tuple[Array, Array, Array]):
        row, fill, held = carry
        number, prompt, length = sequence
        here = fill + length + jnp.where(number == held, 0, prompt) <= width
        placed = (jnp.where(here, row, row + 1), jnp.where(here, fill, 0))
        with_prompt = ~here | (number != held)
        after = (placed[0], placed[1] + jnp.where(with_prompt, prompt, 0) + length, number)
        empty = length == 0
        carry = jax.tree.map(lambda old, new: jnp.where(empty, old, new), carry, after)
        return carry, _Places(jnp.where(empty, row, placed[0]), jnp.where(empty, fill, placed[1]), with_prompt & ~empty)

    start = (jnp.int32(-1), jnp.int32(width), jnp.int32(-1))
    return jax.lax.scan(place, start, (numbers, prompts, lengths))[1]
