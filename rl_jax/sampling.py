"""The distribution that tokens are sampled from, and the draw itself. Letters: B sequences, V vocabulary."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from rl_jax.errors import InputError
from rl_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are sampled.

    Attributes:
        length: C, the most tokens a completion may have.
        group_size: G, completions of each prompt.
        temperature: divides the logits; 0 takes the most likely token. Under a transformation of JAX it may be a
            traced scalar, positive: runs can be mapped over it.
        top_k: keep this many tokens, the most likely; 0 keeps all.
        top_p: keep the fewest tokens whose probability reaches this (nucleus sampling, Holtzman 2020); 1 keeps all.
        min_p: keep tokens with at least this share of the highest probability; 0 keeps all.
        eos: ids of the tokens that end a completion.
        ignore_eos: go on to `length` tokens whatever is sampled.
    """

    length: int
    group_size: int = 1
    temperature: float | Array = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    eos: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.length < 1 or self.group_size < 1:
            raise InputError(f"Completions need a length and a group size of at least 1, not {self}.")
        cold = not isinstance(self.temperature, jax.Array) and not self.temperature >= 0
        if cold or not (self.top_k >= 0 and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise InputError(f"Sampling needs temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1: {self}.")


def is_greedy(sampling: Sampling) -> bool:
    """Whether it takes the most likely token each time."""
    return not isinstance(sampling.temperature, jax.Array) and sampling.temperature == 0


def most_likely(sampling: Sampling) -> Sampling:
    """One completion of each prompt, by the most likely tokens."""
    return dataclasses.replace(sampling, group_size=1, temperature=0.0)


def untruncated(sampling: Sampling) -> Sampling:
    """The same temperature with every token kept, so that divergences from it are finite."""
    return dataclasses.replace(sampling, top_k=0, top_p=1.0, min_p=0.0)


def warp_logits(logits: Array, sampling: Sampling, keep: Array | None = None) -> Array:
    """Logits of the distribution that tokens are sampled from: temperature, then top-k, top-p and min-p in turn.

    Tokens as likely as the least likely one kept are kept too.

    Args:
        logits: float32 [..., V].
        sampling: its temperature is positive.
        keep: a token [...] that no filter may drop. The learner passes the sampled one, which its own rounding
            might otherwise put just outside the nucleus, where its log-probability would be minus infinity.

    Returns:
        [..., V], minus infinity for the tokens that are filtered out.
    """
    if is_greedy(sampling):
        raise InputError("Greedy decoding (temperature 0) has no log-probabilities to learn from; use a temperature.")
    logits = logits / sampling.temperature
    thresholds = []
    vocab = logits.shape[-1]
    if 0 < sampling.top_k < vocab:
        thresholds.append(jax.lax.top_k(logits, sampling.top_k)[0][..., -1:])
    if sampling.top_p < 1:
        kept = jnp.where(logits >= thresholds[-1], logits, -jnp.inf) if thresholds else logits
        ranked = jnp.flip(jnp.sort(kept, axis=-1), axis=-1)
        probabilities = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        thresholds.append(jnp.min(jnp.where(before < sampling.top_p, ranked, jnp.inf), axis=-1, keepdims=True))
    if sampling.min_p > 0:
        thresholds.append(jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p))
    if not thresholds:
        return logits
    allowed = jnp.all(jnp.stack([logits >= threshold for threshold in thresholds]), axis=0)
    if keep is not None:
        allowed |= jax.nn.one_hot(keep, vocab, dtype=bool)
    return jnp.where(jax.lax.stop_gradient(allowed), logits, -jnp.inf)


def draw(logits: Array, uniforms: Array) -> tuple[Array, Array]:
    """Tokens by inverting the cumulative distribution at a uniform number, in two levels.

    The vocabulary is cut into about sqrt(V) blocks: the first level finds the block, the second the token in it.
    It takes one random number a row where Gumbel's trick takes V. Probabilities are met to the 2^-23 steps of a
    float32 uniform.

    Args:
        logits: float32 [B, V]; minus infinity is never drawn.
        uniforms: numbers in [0, 1). float32 [B].

    Returns:
        Tokens int32 [B], and their log-probabilities float32 [B].
    """
    chex.assert_rank([logits, uniforms], [2, 1])
    rows, vocab = logits.shape
    block = 1 << max((vocab - 1).bit_length() // 2, 1)
    highest = jnp.max(logits, axis=-1, keepdims=True)
    masses = jnp.pad(jnp.exp(logits - highest), ((0, 0), (0, -vocab % block))).reshape(rows, -1, block)
    blocks = jnp.sum(masses, axis=-1)
    total = jnp.sum(blocks, axis=-1)
    chosen, below = _invert(blocks, uniforms * total)
    inner = jnp.take_along_axis(masses, chosen[:, None, None], axis=1)[:, 0]
    offset, _ = _invert(inner, uniforms * total - below)
    tokens = chosen * block + offset
    picked = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, picked - highest[:, 0] - jnp.log(total)


def _invert(masses: Array, target: Array) -> tuple[Array, Array]:
    """First index [B] with mass of its own whose cumulative mass is above the target [B], and the mass before it.

    A parallel sum is not monotone to the last bit, so the cumulative masses alone could lead to an index of no mass.
    """
    cumulative = jnp.cumsum(masses, axis=-1)
    reached = jnp.where(masses > 0, cumulative, 0.0)
    target = jnp.clip(target, 0.0, jnp.nextafter(jnp.max(reached, axis=-1), jnp.zeros_like(target)))
    index = jnp.argmax(reached > target[:, None], axis=-1).astype(jnp.int32)
    before = jnp.take_along_axis(cumulative, jnp.maximum(index - 1, 0)[:, None], axis=-1)[:, 0]
    return index, jnp.where(index > 0, before, 0.0)
