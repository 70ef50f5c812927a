"""Rotary position embeddings, and how their frequencies are stretched for contexts longer than trained on."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from rl_jax.types import Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched; what a kind does not use stays as it is here.

    Attributes:
        kind: linear (all by the factor, Chen 2023); llama3 (slow ones by the factor, fast ones not, those between by
            degrees, Llama 3.1); yarn (the same over dimensions, Peng 2023); dynamic (only beyond the context, where
            nothing is computed here, so it changes nothing).
        factor: what slow frequencies are divided by.
        original_context: tokens that the model was first trained on, which llama3 and yarn count turns in.
        low: llama3: a frequency with fewer turns than this is slow. yarn: the same (beta_slow).
        high: llama3: one with more turns is fast. yarn: the same (beta_fast).
        attention_factor: yarn: what sines and cosines are multiplied by.
        truncate: yarn: whether the dimensions where slow and fast begin are made whole numbers.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn"]
    factor: float
    original_context: int = 0
    low: float = 1.0
    high: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


def frequencies(theta: float, size: int, scaling: RopeScaling | None = None) -> Array:
    """Radians a token of each of the pairs of a head. float32 [K / 2].

    Args:
        theta: their base.
        size: K.
        scaling: how they are stretched.
    """
    half = size // 2
    plain = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is None or scaling.kind == "dynamic":
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        turns = scaling.original_context * plain / (2 * math.pi)
        return _blend(plain, scaling.factor, (turns - scaling.low) / (scaling.high - scaling.low))
    first, last = (_dimension(turns, theta, size, scaling) for turns in (scaling.high, scaling.low))
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    return _blend(plain, scaling.factor, 1 - (jnp.arange(half) - first) / max(last - first, 0.001))


def _blend(plain: Array, factor: float, fast: Array) -> Array:
    """Frequencies divided by the factor where `fast` is 0 or less, as they are where it is 1 or more. [K / 2]."""
    fast = jnp.clip(fast, 0, 1)
    return plain / factor * (1 - fast) + plain * fast


def _dimension(turns: float, theta: float, size: int, scaling: RopeScaling) -> float:
    """The dimension whose frequency turns so often in the original context (Peng 2023, section 3.2)."""
    return size * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))


def rotate(x: Array, positions: Array, theta: float, scaling: RopeScaling | None = None) -> Array:
    """Rotary position embedding (RoFormer, eq. 34), halves rotated against each other.

    Args:
        x: queries or keys. [B, S, H, K].
        positions: int32 [B, S].
        theta: base of the frequencies.
        scaling: how they are stretched.
    """
    half, factor = x.shape[-1] // 2, scaling.attention_factor if scaling else 1.0
    turned = frequencies(theta, x.shape[-1], scaling)
    angles = positions[:, :, None, None].astype(jnp.float32) * turned[None, None, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if factor != 1:
        cos, sin = factor * cos, factor * sin
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
