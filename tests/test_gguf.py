"""GGUF files as llama.cpp's converter writes them, read as the model and the tokenizer that they were made of."""

import importlib.util
import json

import gguf
import jax
import numpy as np
import pytest

from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.config import llama
from rl_jax.models.gguf import gguf_tokenizer, read_gguf
from rl_jax.models.huggingface import load_policy
from rl_jax.models.tensors import to_tensors
from rl_jax.models.transformer import init_params

VOCAB = 260
CONFIGS = {
    "llama": llama(VOCAB, 64, 2, 32, 4, kv_heads=2, mlp_width=64, tied=False, rope_theta=500.0),
    "qwen2": llama(VOCAB, 64, 2, 32, 4, kv_heads=2, mlp_width=64, qkv_bias=True),
    "qwen3": llama(VOCAB, 64, 2, 32, 4, kv_heads=2, mlp_width=64, qk_norm=True, head_size=16, norm_epsilon=1e-6),
}
THEIRS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TOKENIZER = train_tokenizer(["the cat sat on the mat, the cat sat"] * 2, VOCAB)


def random_params(config):
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 1, x.shape).astype(np.float32), shapes)


def paired(rows, heads):
    """Row i of the first half of each head beside row i of its second half, as llama.cpp rotates them."""
    size = len(rows) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def named(name):
    """The name in a GGUF file of a tensor of transformers."""
    name, leaf = name.rsplit(".", 1)
    if name.startswith("model.layers."):
        layer, part = name.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{THEIRS[part]}.{leaf}"
    return f"{THEIRS[name]}.{leaf}"


def write(path, kind="llama", change=lambda writer, tensors: None, quantized=False, **words):
    """A GGUF file of the random model of a family."""
    config = CONFIGS[kind]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(words.pop("theta", config.rope_theta))
    if config.head_size * config.heads != config.width:
        writer.add_key_length(config.head_size)
    state = json.loads(TOKENIZER.backend_tokenizer.to_str())
    tokens = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    words = {"model": "gpt2", "pre": "gpt-2", "eos": 0, "eot": None, "types": [3] + [1] * (VOCAB - 1)} | words
    writer.add_tokenizer_model(words["model"])
    writer.add_tokenizer_pre(words["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(words["types"])
    used = [token for token, kind in zip(tokens, words["types"], strict=True) if kind != 5]
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"] if "".join(merge) in used])
    writer.add_eos_token_id(words["eos"])
    if words["eot"] is not None:
        writer.add_eot_token_id(words["eot"])
    writer.add_chat_template(TEMPLATE)
    tensors = {}
    for name, value in to_tensors(random_params(config), config).items():
        heads = {"q": config.heads, "k": config.kv_heads}.get(name.partition("self_attn.")[2][:1])
        rotated = kind == "llama" and "_proj" in name and heads
        tensors[named(name)] = paired(value, heads) if rotated else value
    change(writer, tensors)
    for name, value in tensors.items():
        if quantized and value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_is_read_as_it_was_before_it_was_converted(kind, tmp_path):
    policy = load_policy(write(tmp_path / "model.gguf", kind))
    assert policy.config == CONFIGS[kind]
    jax.tree.map(np.testing.assert_array_equal, policy.params, random_params(CONFIGS[kind]))
    text = "the mat sat, 123 the cat \N{CAT FACE}<|endoftext|>the"
    assert policy.tokenizer.encode(text) == TOKENIZER.encode(text)
    assert policy.tokenizer.decode(policy.tokenizer.encode(text)) == text
    assert policy.ends == (0,)
    assert policy.tokenizer.chat_template == TEMPLATE


def test_weights_of_few_bits_are_near_what_they_were(tmp_path):
    policy = load_policy(write(tmp_path / "model.gguf", quantized=True))
    steps = jax.tree.map(lambda x, y: np.abs(x - y).max(), policy.params, random_params(CONFIGS["llama"]))
    assert 0 < max(jax.tree.leaves(steps)) < 0.03  # of normal numbers in 254 steps between their extremes


def test_a_word_that_is_no_token_and_a_second_end(tmp_path):
    types = [3] + [1] * (VOCAB - 2) + [5]
    policy = load_policy(write(tmp_path / "model.gguf", types=types, eot=7))
    assert policy.ends == (0, 7)
    assert VOCAB - 1 not in policy.tokenizer.get_vocab().values()
    assert policy.config.vocab_size == VOCAB


def test_rotary_scaling_is_found_in_the_frequencies_alone(tmp_path):
    """Llama 3.1's: what turns less than once in 8192 tokens turns 8 times slower, what turns 4 times as it did."""

    def scale(*factors):
        def change(writer, tensors):
            tensors["rope_freqs.weight"] = np.array(factors, np.float32)

        return change

    share = (8192 / (2 * np.pi * 500_000**0.5) - 1) / 3  # the third pair of four turns 1.84 times
    path = write(tmp_path / "a.gguf", change=scale(1, 1, 1 / ((1 - share) / 8 + share), 8), theta=500_000.0)
    assert read_gguf(path)[0]["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    with pytest.raises(InputError, match="rotary frequencies"):
        read_gguf(write(tmp_path / "b.gguf", change=scale(1, 1, 4, 8), theta=500_000.0))


def add_bias(writer, tensors):
    tensors["blk.1.attn_output.bias"] = np.zeros(32, np.float32)


def turn_half(writer, tensors):
    writer.add_rope_dimension_count(4)


def drop(writer, tensors):
    del tensors["blk.1.ffn_up.weight"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "llama"}, "tokenizers of the kind 'llama'"),
        ({"pre": "tekken"}, "cut text as 'tekken' does"),
        ({"change": add_bias}, r"blk\.1\.attn_output\.bias"),
        ({"change": turn_half}, "partial_rotary_factor = 0.5"),
        ({"change": drop}, r"lack the tensor model\.layers\.1\.mlp\.up_proj\.weight"),
    ],
    ids=["tokenizer", "cut", "bias", "rotary", "missing"],
)
def test_what_is_not_supported_is_named(settings, said, tmp_path):
    path = write(tmp_path / "model.gguf", **settings)
    with pytest.raises(InputError, match=said) as error:
        load_policy(path)
    assert str(path) in str(error.value)


def test_another_architecture_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"architecture 'mamba' are not supported; llama, qwen2, qwen3 are"):
        load_policy(tmp_path / "model.gguf")


@pytest.mark.parametrize("cut", [0, 4, 100, 5000, -4000], ids=str)
def test_a_damaged_file_is_one_error(cut, tmp_path):
    path = write(tmp_path / "model.gguf")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError) as error:
        load_policy(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_package_that_reads_it_may_be_missing(tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install gguf"):
        load_policy(path)


CUTS = {
    "gpt-2": ["Hello", "Ġworld", "Ġ", "Ġ12", "'ll", "Ċ"],
    "smollm": ["Hello", "Ġworld", "ĠĠ", "1", "2", "'ll", "Ċ"],
    "qwen2": ["Hello", "Ġworld", "Ġ", "Ġ", "1", "2", "'ll", "Ċ"],
    "llama-bpe": ["Hello", "Ġworld", "Ġ", "Ġ", "12", "'ll", "Ċ"],
}


@pytest.mark.parametrize("cut", CUTS)
def test_text_is_cut_as_the_models_tokenizer_json_does(cut, tmp_path):
    words = gguf_tokenizer(read_gguf(write(tmp_path / "model.gguf", pre=cut))[2])
    found = [word for word, _ in words.backend_tokenizer.pre_tokenizer.pre_tokenize_str("Hello world  12'll\n")]
    assert found == CUTS[cut]
