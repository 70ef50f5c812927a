import dataclasses
import functools
import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.families import family, from_settings, to_settings
from rl_jax.models.huggingface import Policy, load_policy, save_policy
from rl_jax.models.tensors import from_tensors, to_tensors
from rl_jax.models.transformer import gpt2, init_params, llama

VOCAB = 260
CONFIGS = {
    "gpt2": gpt2(VOCAB, 32, 2, 16, 2, mlp_width=48, norm_epsilon=1e-4),
    "llama": llama(VOCAB, 32, 2, 16, 4, kv_heads=2, mlp_width=24, tied=False, rope_theta=500.0),
    "qwen2": llama(VOCAB, 32, 2, 16, 4, kv_heads=1, mlp_width=24, qkv_bias=True),
    "qwen3": llama(VOCAB, 32, 2, 16, 4, kv_heads=2, mlp_width=24, qk_norm=True, head_size=6, norm_epsilon=1e-6),
}
every_family = pytest.mark.parametrize("name", CONFIGS)


def random_params(config):
    """Parameters no two of which are alike."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 1, x.shape).astype(np.float32), shapes)


@functools.cache
def tokenizer():
    return train_tokenizer(["the cat sat on the mat, the cat sat"] * 2, VOCAB)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of policies, one of each family; for reading."""
    folder = tmp_path_factory.mktemp("policies")
    for name, config in CONFIGS.items():
        save_policy(folder / name, Policy(random_params(config), config, tokenizer()))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the GPT-2 policy, to be spoilt."""
    return shutil.copytree(saved / "gpt2", tmp_path / "policy")


def assert_params_equal(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@every_family
def test_policies_survive_the_round_trip(saved, name):
    policy = load_policy(saved / name)
    assert policy.config == CONFIGS[name]
    assert_params_equal(policy.params, random_params(CONFIGS[name]))
    assert {x.dtype for x in jax.tree.leaves(policy.params)} == {np.dtype("float32")}
    text = "the mat sat, the cat \N{CAT FACE}"
    assert policy.tokenizer.encode(text) == tokenizer().encode(text)
    assert policy.tokenizer.eos_token_id == tokenizer().eos_token_id
    assert json.loads((saved / name / "config.json").read_text())["model_type"] == name == family(policy.config)


def test_compute_settings_are_the_readers(saved):
    config = load_policy(saved / "llama", "bfloat16", remat=True).config
    assert config == dataclasses.replace(CONFIGS["llama"], dtype="bfloat16", remat=True)
    tensors = to_tensors(random_params(config), config)
    assert {x.dtype for x in tensors.values()} == {np.dtype("float32")}
    assert from_settings(to_settings(config, 0)) == CONFIGS["llama"]


def test_names_and_layouts_of_gpt2():
    params = random_params(CONFIGS["gpt2"])
    tensors = to_tensors(params, CONFIGS["gpt2"])
    shapes = {"wte.weight": (VOCAB, 16), "wpe.weight": (32, 16), "ln_f.weight": (16,), "ln_f.bias": (16,)}
    for layer in (0, 1):
        matrices = {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16), "mlp.c_fc": (16, 48), "mlp.c_proj": (48, 16)}
        for module, shape in matrices.items():
            shapes |= {f"h.{layer}.{module}.weight": shape, f"h.{layer}.{module}.bias": shape[1:]}
        for module in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{module}.weight": (16,), f"h.{layer}.{module}.bias": (16,)}
    assert {name: x.shape for name, x in tensors.items()} == shapes
    block = params["block_1"]
    for number, part in enumerate(("query", "key", "value")):
        columns = slice(16 * number, 16 * number + 16)
        np.testing.assert_array_equal(tensors["h.1.attn.c_attn.weight"][:, columns], block["attention"][part]["kernel"])
        np.testing.assert_array_equal(tensors["h.1.attn.c_attn.bias"][columns], block["attention"][part]["bias"])
    np.testing.assert_array_equal(tensors["h.1.mlp.c_fc.weight"], block["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(tensors["h.1.ln_2.weight"], block["mlp_norm"]["scale"])


def test_names_and_layouts_of_the_llamas():
    params = random_params(CONFIGS["llama"])
    tensors = to_tensors(params, CONFIGS["llama"])
    shapes = {"model.embed_tokens.weight": (VOCAB, 16), "model.norm.weight": (16,), "lm_head.weight": (VOCAB, 16)}
    modules = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16)}
    modules |= {"self_attn.o_proj": (16, 16), "input_layernorm": (16,), "post_attention_layernorm": (16,)}
    modules |= {"mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24)}
    for layer in (0, 1):
        shapes |= {f"model.layers.{layer}.{module}.weight": shape for module, shape in modules.items()}
    assert {name: x.shape for name, x in tensors.items()} == shapes
    kernel = params["block_1"]["attention"]["out"]["kernel"]
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.o_proj.weight"], np.transpose(kernel))

    def extra(name):
        names = to_tensors(random_params(CONFIGS[name]), CONFIGS[name])
        return {key.removeprefix("model.layers.1.self_attn.") for key in names if "layers.1" in key} - {
            key.removeprefix("model.layers.1.self_attn.") for key in shapes
        }

    assert extra("qwen2") == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    assert extra("qwen3") == {"q_norm.weight", "k_norm.weight"}


@every_family
def test_every_tensor_is_asked_for(name):
    params, config = random_params(CONFIGS[name]), CONFIGS[name]
    tensors = to_tensors(params, config)
    assert_params_equal(from_tensors(tensors | {"h.0.attn.masked_bias": np.zeros(1)}, config), params)
    for missing in tensors:
        with pytest.raises(InputError, match=f"lack the tensor {missing}, which"):
            from_tensors({key: x for key, x in tensors.items() if key != missing}, config)
        wrong = tensors[missing][..., :-1]
        with pytest.raises(InputError) as error:
            from_tensors(tensors | {missing: wrong}, config)
        assert f"{missing} has shape {wrong.shape}" in str(error.value)
        assert f"asks for {tensors[missing].shape}" in str(error.value)


def test_square_matrices_are_not_mixed_up():
    """Transposed weights would have the right shape where a projection is square."""
    tensors = to_tensors(random_params(CONFIGS["llama"]), CONFIGS["llama"])
    name = "model.layers.0.self_attn.q_proj.weight"
    params = from_tensors(tensors, CONFIGS["llama"])
    np.testing.assert_array_equal(params["block_0"]["attention"]["query"]["kernel"], tensors[name].T)
    assert np.any(tensors[name] != tensors[name].T)


def test_other_number_types_and_prefixes_are_read(folder):
    tensors = load_file(folder / "model.safetensors")
    coarse = {f"transformer.{name}": x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    save_file(coarse, folder / "model.safetensors")
    params = load_policy(folder).params
    expected = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), random_params(CONFIGS["gpt2"]))
    assert_params_equal(params, expected)
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}


LLAMA_SETTINGS = {
    "model_type": "llama",
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "rms_norm_eps": 1e-6,
}
GPT2_SETTINGS = {"model_type": "gpt2", "vocab_size": 50, "n_positions": 64, "n_layer": 2, "n_embd": 16, "n_head": 4}


def test_settings_left_out_are_those_of_transformers():
    expected = llama(50, 64, 2, 16, 4, mlp_width=40, norm_epsilon=1e-6, tied=False)
    assert from_settings(LLAMA_SETTINGS) == expected
    nothing = {"num_key_value_heads": None, "head_dim": None, "rope_scaling": None}
    assert from_settings(LLAMA_SETTINGS | nothing) == expected
    assert from_settings(GPT2_SETTINGS) == gpt2(50, 64, 2, 16, 4)
    assert from_settings(GPT2_SETTINGS | {"n_inner": None}) == gpt2(50, 64, 2, 16, 4)


def test_the_rotary_base_is_read_by_either_name():
    for settings in ({"rope_theta": 500}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}):
        assert from_settings(LLAMA_SETTINGS | settings).rope_theta == 500.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": None}, "None"),
        (GPT2_SETTINGS | {"activation_function": "relu"}, "activation_function = 'relu'"),
        (GPT2_SETTINGS | {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        (GPT2_SETTINGS | {"scale_attn_weights": False}, "scale_attn_weights"),
        (GPT2_SETTINGS | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2_SETTINGS | {"n_head": 3}, "width of 16 .* 3 heads"),
        (LLAMA_SETTINGS | {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        (LLAMA_SETTINGS | {"attention_bias": True}, "attention_bias = True"),
        (LLAMA_SETTINGS | {"mlp_bias": True}, "mlp_bias = True"),
        (LLAMA_SETTINGS | {"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window = True"),
        (LLAMA_SETTINGS | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type = 'llama3'"),
        (LLAMA_SETTINGS | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type = 'linear'"),
        (LLAMA_SETTINGS | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        (LLAMA_SETTINGS | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({key: LLAMA_SETTINGS[key] for key in LLAMA_SETTINGS if key != "hidden_size"}, "lacks 'hidden_size'"),
        ({key: GPT2_SETTINGS[key] for key in GPT2_SETTINGS if key != "n_layer"}, "lacks 'n_layer'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "settings",
)
def test_settings_that_are_not_supported_are_named(settings, named):
    with pytest.raises(InputError, match=named):
        from_settings(settings)


@pytest.mark.parametrize(
    "config",
    [
        llama(50, 64, 2, 16, 4, qk_norm=True, qkv_bias=True),
        llama(50, 64, 2, 16, 4, norm="layer"),
        gpt2(50, 64, 2, 16, 4, tied=False),
        gpt2(50, 64, 2, 16, 4, kv_heads=2),
    ],
    ids=["both", "norm", "untied", "grouped"],
)
def test_models_that_nobody_could_read_are_not_written(tmp_path, config):
    with pytest.raises(InputError, match="this is none of them"):
        save_policy(tmp_path / "policy", Policy(random_params(config), config, tokenizer()))
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle, which is not read")
    with pytest.raises(InputError, match=f"{folder} is not a policy: it has no {file}"):
        load_policy(folder)
    with pytest.raises(InputError, match="nowhere is not a policy"):
        load_policy(folder / "nowhere")


def truncated(content):
    return content[: len(content) // 2]


def flipped(content):
    return bytes([content[0] ^ 0xFF, *content[1:]])


@pytest.mark.parametrize("spoil", [truncated, flipped, lambda content: b""], ids=["truncated", "flipped", "empty"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_corrupted_file_is_one_clear_error(folder, file, spoil):
    (folder / file).write_bytes(spoil((folder / file).read_bytes()))
    with pytest.raises(InputError) as error:
        load_policy(folder)
    assert str(folder) in str(error.value) and "read" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tensor_that_the_file_lacks_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["h.1.mlp.c_fc.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lack the tensor h\.1\.mlp\.c_fc\.bias"):
        load_policy(folder)
