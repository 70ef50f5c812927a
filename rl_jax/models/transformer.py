"""One decoder-only Transformer, with an explicit key-value cache.

Flax Linen stays inside this folder: outside it a model is a configuration, a pytree of parameters, and the pure
functions at the end of this file. Letters: B sequences, S new tokens, T columns attended to, D width, H heads,
J key-value heads, K head size, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.tree_util import Partial

from rl_jax.models.attention import Focus, attend, capped
from rl_jax.models.config import Dtype, TransformerConfig
from rl_jax.models.dense import project
from rl_jax.models.rotary import rotate
from rl_jax.run.spmd import laid_as_batch, laid_whole, traced_once
from rl_jax.types import Array, PyTree

INIT_STD = 0.02  # GPT-2's; residual projections divide it by sqrt(2 layers)


Pairs = tuple[tuple[Array, Array], ...]
"""Keys, which are rotated, and values of each layer."""


class Cache(NamedTuple):
    """What decoding remembers. Column t of every array is token t of the padded sequence.

    Attributes:
        pairs: [B, J, T, K].
        mask: false on the padding of prompts; columns not yet written are true, and hidden by causality. [B, T].
    """

    pairs: Pairs
    mask: Array


class Dense(nn.Module):
    """A dense layer, and the low-rank adapter (Hu 2021) that stands beside its kernel where the parameters have one."""

    features: int
    bias: bool
    dtype: Dtype
    std: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))
        out = project(x, kernel.astype(self.dtype))
        if self.has_variable("params", "lora_a"):
            low, high = (jnp.asarray(self.get_variable("params", f"lora_{leaf}"), self.dtype) for leaf in "ab")
            out = out + project(project(x, low), high)
        if self.bias:
            out = out + self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)[None, :]
        return out


def _dense(config: TransformerConfig, features: int, name: str, bias: bool, std: float = INIT_STD) -> Dense:
    return Dense(features, bias, config.dtype, std, name=name)


class RMSNormPlusOne(nn.Module):
    """RMSNorm whose scale is 0 where it leaves the size as it is."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = 1 + self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        normed = nn.RMSNorm(epsilon=self.epsilon, dtype=jnp.float32, use_scale=False)(x)
        return (normed * scale.reshape(*[1] * (x.ndim - 1), -1)).astype(self.dtype)


def _norm(config: TransformerConfig, name: str) -> nn.Module:
    kind = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "rms_plus_one": RMSNormPlusOne}[config.norm]
    return kind(epsilon=config.norm_epsilon, dtype=jnp.float32, name=name)


def _look_up(table: nn.Embed, rows: Array) -> Array:
    return jnp.take(laid_whole(table.embedding), rows, axis=0)


Look = Callable[[Array, Array, Array, Focus], tuple[Array, Any]]
"""How new tokens look at tokens: query [B, S, H, K], key and value [B, J, S, K], and how far and how the layer looks
-> what they see [B, S, H, K], and what is kept for the tokens that follow. A `Partial`, so that it is a pytree of what
it holds."""


def _look_around(
    mask: Array, positions: Array, query: Array, key: Array, value: Array, focus: Focus
) -> tuple[Array, tuple[Array, Array]]:
    """At each other, where the mask [B, S, S] is true and the positions [B, S] near; keys and values are kept."""
    if focus.window:
        mask = mask & (positions[:, :, None] - positions[:, None, :] < focus.window)
    return attend(query, key, value, mask, focus.cap), (key, value)


def look_back(
    keys: Array, values: Array, mask: Array, index: Array, query: Array, key: Array, value: Array, focus: Focus
) -> tuple[Array, tuple[Array, Array]]:
    """At a cache [B, J, T, K], where the mask [B, S, T] is true, once they are written to its columns from `index`."""
    keys = jax.lax.dynamic_update_slice_in_dim(keys, key, index, axis=2)
    values = jax.lax.dynamic_update_slice_in_dim(values, value, index, axis=2)
    if focus.window:
        first = index + jnp.arange(mask.shape[1]) - focus.window
        mask = mask & (jnp.arange(mask.shape[2])[None, :] > first[:, None])[None, :, :]
    return attend(query, keys, values, mask, focus.cap), (keys, values)


class Attention(nn.Module):
    config: TransformerConfig
    window: int

    @nn.compact
    def __call__(self, x: Array, positions: Array, look: Look) -> tuple[Array, Any]:
        c = self.config
        b, s = positions.shape
        heads = {"query": c.heads, "key": c.kv_heads, "value": c.kv_heads}
        query, key, value = (
            _dense(c, n * c.head_size, name, c.qkv_bias)(x).reshape(b, s, n, c.head_size) for name, n in heads.items()
        )
        if c.qk_norm:
            kind = RMSNormPlusOne if c.norm == "rms_plus_one" else nn.RMSNorm
            query = kind(epsilon=c.norm_epsilon, dtype=c.dtype, name="query_norm")(query)
            key = kind(epsilon=c.norm_epsilon, dtype=c.dtype, name="key_norm")(key)
        if c.positions == "rotary":
            local = bool(self.window and c.window_theta)
            theta, scaling = (c.window_theta, None) if local else (c.rope_theta, c.rope_scaling)
            query, key = rotate(query, positions, theta, scaling), rotate(key, positions, theta, scaling)
        if c.attention_size:
            query = query * jnp.asarray((c.head_size / c.attention_size) ** 0.5, query.dtype)
        focus = Focus(self.window, c.attention_cap)
        seen, kept = look(query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2), focus)
        out = _dense(c, c.width, "out", c.out_bias, INIT_STD / (2 * c.layers) ** 0.5)
        return out(seen.reshape(b * s, c.heads * c.head_size)), kept


class Mlp(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        up = _dense(c, c.mlp_width, "up", c.mlp_bias)(x)
        if c.mlp == "gelu":
            hidden = nn.gelu(up, approximate=True)
        else:
            activation = nn.silu if c.mlp == "swiglu" else nn.gelu
            hidden = activation(_dense(c, c.mlp_width, "gate", c.mlp_bias)(x)) * up
        return _dense(c, c.width, "down", c.mlp_bias, INIT_STD / (2 * c.layers) ** 0.5)(hidden)


class Block(nn.Module):
    config: TransformerConfig
    window: int

    @nn.compact
    def __call__(self, x: Array, positions: Array, look: Look) -> tuple[Array, Any]:
        c = self.config

        def after(x: Array, name: str) -> Array:
            return _norm(c, name)(x).astype(c.dtype) if c.post_norms else x

        normed = _norm(c, "attention_norm")(x).astype(c.dtype)
        mixed, kept = Attention(c, self.window, name="attention")(normed, positions, look)
        x = laid_as_batch(x + after(mixed, "attention_post_norm"))
        thought = Mlp(c, name="mlp")(_norm(c, "mlp_norm")(x).astype(c.dtype))
        return laid_as_batch(x + after(thought, "mlp_post_norm")), kept


class Transformer(nn.Module):
    """Tokens to final states; `unembed` turns states to logits."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(INIT_STD)
        self.embedding = nn.Embed(c.vocab_size, c.width, embedding_init=init)
        if c.positions == "learned":
            self.position_embedding = nn.Embed(c.context, c.width, embedding_init=init)
        block = nn.remat(Block) if c.remat else Block
        self.blocks = [block(c, c.window(layer), name=f"block_{layer}") for layer in range(c.layers)]
        self.final_norm = _norm(c, "final_norm")
        if not c.tied:
            self.output = _dense(c, c.vocab_size, "output", bias=False)

    def __call__(self, tokens: Array, positions: Array, looks: Sequence[Look]) -> tuple[Array, tuple[Any, ...]]:
        """States [B, S, D] after the final norm, and what the look of each layer kept."""
        c = self.config
        x = _look_up(self.embedding, tokens).astype(c.dtype)
        if c.scaled_embedding:
            x = x * jnp.asarray(c.width**0.5, c.dtype)
        if c.positions == "learned":
            x = x + _look_up(self.position_embedding, positions).astype(c.dtype)
        # [B S, D]: XLA on CPU shares work among threads along the first axis alone.
        x = laid_as_batch(x.reshape(-1, c.width))
        kept = []
        for block, look in zip(self.blocks, looks, strict=True):
            x, remembered = block(x, positions, look)
            kept.append(remembered)
        if self.is_initializing() and not c.tied:
            self.output(x)
        return self.final_norm(x).astype(c.dtype).reshape(*tokens.shape, c.width), tuple(kept)

    def unembed(self, states: Array) -> Array:
        """Logits [..., V] of states [..., D], float32."""
        c = self.config
        kernel = self.embedding.embedding if c.tied else self.output.variables["params"]["kernel"]
        kernel = kernel.astype(c.dtype)
        if c.tied and states.ndim == 2:
            # A state for each sequence, as in decoding. This way round a CPU reads the embedding as it lies, twice as
            # fast for a few states; the barrier keeps XLA from turning the product round again.
            scores = jnp.einsum("vd,bd->vb", kernel, states, preferred_element_type=jnp.float32)
            return capped(jax.lax.optimization_barrier(scores).T, c.logit_cap)
        equation = "...d,vd->...v" if c.tied else "...d,dv->...v"
        return capped(jnp.einsum(equation, states, kernel, preferred_element_type=jnp.float32), c.logit_cap)


def init_params(key: Array, config: TransformerConfig) -> PyTree:
    """Random parameters, float32: normal with standard deviation 0.02, residual projections scaled down by depth."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    looks = [Partial(_look_around, jnp.ones((1, 1, 1), bool), tokens)] * config.layers
    return Transformer(config).init(key, tokens, tokens, looks)["params"]


def parameter_shapes(config: TransformerConfig) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Path and shape of each parameter, one layer after another, since a config.json can ask for any number of them."""
    one = dataclasses.replace(config, layers=1)  # tracing takes as long as there are blocks
    flat: dict[tuple[str, ...], Any] = flatten_dict(jax.eval_shape(lambda: init_params(jax.random.key(0), one)))
    yield from ((path, x.shape) for path, x in flat.items() if path[0] != "block_0")
    for layer in range(config.layers):
        yield from (((f"block_{layer}", *path[1:]), x.shape) for path, x in flat.items() if path[0] == "block_0")


def token_positions(mask: Array) -> Array:
    """Position of each real token among the real tokens of its row; 0 on the padding before them. [B, T]."""
    return jnp.maximum(jnp.cumsum(mask.astype(jnp.int32), axis=1) - 1, 0)


def hidden_states(params: PyTree, tokens: Array, mask: Array, config: TransformerConfig) -> Array:
    """Final states of every position, each of which sees the real tokens up to itself.

    Args:
        params: the model's parameters.
        tokens: int32 [B, T].
        mask: true on real tokens; padding may stand on either side. bool [B, T].
        config: the model's configuration.

    Returns:
        [B, T, D] in the compute dtype; state t predicts token t + 1.
    """
    chex.assert_rank([tokens, mask], 2)
    chex.assert_equal_shape([tokens, mask])
    return _read(params, config, tokens, mask)[0]


def seen_states(params: PyTree, tokens: Array, positions: Array, seen: Array, config: TransformerConfig) -> Array:
    """Final states of tokens that see what they are told to.

    Args:
        params: the model's parameters.
        tokens: int32 [B, T].
        positions: of each token in its sequence. int32 [B, T].
        seen: which columns each token sees, itself among them. bool [B, T, T].
        config: the model's configuration.

    Returns:
        [B, T, D] in the compute dtype.
    """
    return _apply(params, config, tokens, positions, [Partial(_look_around, seen, positions)] * config.layers)[0]


def step_states(
    params: PyTree, tokens: Array, positions: Array, looks: Sequence[Look], config: TransformerConfig
) -> tuple[Array, tuple[Any, ...]]:
    """Final states [B, D] of one token of each sequence, and what the look of each layer kept. int32 [B], [B]."""
    states, kept = _apply(params, config, tokens[:, None], positions[:, None], looks)
    return states[:, 0], kept


def logits(params: PyTree, states: Array, config: TransformerConfig) -> Array:
    """Logits of the next token. [..., D] -> float32 [..., V]."""
    scores: Any = Transformer(config).apply({"params": params}, states, method="unembed")
    return scores


def add_value_head(params: PyTree, config: TransformerConfig) -> PyTree:
    """The parameters with a critic beside them: a linear function of the final states, 0 to begin with."""
    head = {"kernel": jnp.zeros((config.width, 1)), "bias": jnp.zeros(1)}
    return {**params, "value_head": head}


def values(params: PyTree, states: Array) -> Array | None:
    """What the critic expects after each state. [..., D] -> float32 [...]; None where there is no critic."""
    if "value_head" not in params:
        return None
    head = params["value_head"]
    return jnp.einsum("...d,dk->...k", states.astype(jnp.float32), head["kernel"])[..., 0] + head["bias"][0]


def prefill(params: PyTree, tokens: Array, mask: Array, config: TransformerConfig, columns: int) -> tuple[Array, Cache]:
    """Read left-padded prompts into a new cache.

    Args:
        params: the model's parameters.
        tokens: int32 [B, P].
        mask: true on real tokens; the last column is. bool [B, P].
        config: the model's configuration.
        columns: T, the columns of the cache, P included.

    Returns:
        The state [B, D] that predicts the first completion token, and the cache.
    """
    room = columns - tokens.shape[1]
    states, kept = _read(params, config, tokens, mask)
    grown = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0))), kept)
    return states[:, -1], Cache(grown, jnp.pad(mask, ((0, 0), (0, room)), constant_values=True))


def decode_step(
    params: PyTree, cache: Cache, tokens: Array, index: Array, config: TransformerConfig
) -> tuple[Array, Cache]:
    """Append one token to every sequence.

    Args:
        params: the model's parameters.
        cache: as `prefill` or the step before returned it.
        tokens: int32 [B].
        index: the column that the tokens take, the same for every sequence. int32 [].
        config: the model's configuration.

    Returns:
        The state [B, D] that predicts the token after, and the cache with column `index` written.
    """
    seen = cache.mask & (jnp.arange(cache.mask.shape[1]) <= index)[None, :]
    positions = jnp.sum(seen, axis=1, dtype=jnp.int32) - 1
    looks = [Partial(look_back, keys, values, seen[:, None, :], index) for keys, values in cache.pairs]
    states, pairs = step_states(params, tokens, positions, looks, config)
    return states, cache._replace(pairs=pairs)


@functools.partial(traced_once, static=("config",))
def _apply(
    params: PyTree, config: TransformerConfig, tokens: Array, positions: Array, looks: Sequence[Look]
) -> tuple[Array, tuple[Any, ...]]:
    read: Any = Transformer(config).apply({"params": params}, tokens, positions, looks)
    return read


def _read(params: PyTree, config: TransformerConfig, tokens: Array, mask: Array) -> tuple[Array, tuple[Any, ...]]:
    """Every token sees the real ones up to itself."""
    columns = jnp.arange(mask.shape[1])
    seen = (columns[None, :] <= columns[:, None])[None, :, :] & mask[:, None, :]
    positions = token_positions(mask)
    return _apply(params, config, tokens, positions, [Partial(_look_around, seen, positions)] * config.layers)
