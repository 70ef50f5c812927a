import copy
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
from rl_jax.models.config import gpt2, llama
from rl_jax.models.families import family, from_settings, to_settings
from rl_jax.models.huggingface import Policy, load_policy, save_policy
from rl_jax.models.layout import put_model
from rl_jax.models.tensors import from_tensors, to_tensors
from rl_jax.models.transformer import init_params
from rl_jax.run.spmd import make_mesh

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


def with_template():
    """The tokenizer, which also has a chat template."""
    words = copy.deepcopy(tokenizer())
    words.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"
    return words


@every_family
def test_shards_are_read_as_one_file_is(name, tmp_path):
    policy = Policy(random_params(CONFIGS[name]), CONFIGS[name], tokenizer())
    save_policy(tmp_path, policy, shard_bytes=18_000)
    shards = sorted(path.name for path in tmp_path.glob("model*.safetensors"))
    assert shards[0] == f"model-00001-of-0000{len(shards)}.safetensors" and len(shards) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(x.size for x in jax.tree.leaves(policy.params))
    sizes = {shard: {key: x.nbytes for key, x in load_file(tmp_path / shard).items()} for shard in shards}
    assert {key: shard for shard in shards for key in sizes[shard]} == index["weight_map"]
    assert all(sum(size.values()) <= 18_000 for size in sizes.values())
    assert_params_equal(load_policy(tmp_path).params, policy.params)
    save_policy(tmp_path, policy)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    save_policy(tmp_path, policy, shard_bytes=1)
    assert len(list(tmp_path.glob("model-*"))) == len(index["weight_map"])
    assert_params_equal(load_policy(tmp_path).params, policy.params)


def test_what_is_wrong_with_shards_is_named(tmp_path):
    save_policy(tmp_path, Policy(random_params(CONFIGS["gpt2"]), CONFIGS["gpt2"], tokenizer()), shard_bytes=18_000)
    first, second = sorted(tmp_path.glob("model-*"))[:2]
    index, content = tmp_path / "model.safetensors.index.json", second.read_bytes()
    said = json.loads(index.read_text())
    name = next(name for name, file in said["weight_map"].items() if file == first.name)
    second.unlink()
    with pytest.raises(InputError, match=f"{second}.* is missing"):
        load_policy(tmp_path)
    second.write_bytes(content[:100])
    with pytest.raises(InputError, match=f"{second} cannot be read"):
        load_policy(tmp_path)
    second.write_bytes(content)
    index.write_text(json.dumps({"weight_map": said["weight_map"] | {name: second.name}}))
    with pytest.raises(InputError, match=f"{second} lacks the tensor {name}"):
        load_policy(tmp_path)
    for spoilt in ("{", "{}", "[]", '{"weight_map": []}'):
        index.write_text(spoilt)
        with pytest.raises(InputError, match=f"{index}"):
            load_policy(tmp_path)


def test_tensors_are_read_one_at_a_time():
    events = []

    class Recorded(dict):
        def __getitem__(self, name):
            events.append("read")
            return super().__getitem__(name)

    def place(path, value):
        events.append("place")
        return value.copy()

    tensors = to_tensors(random_params(CONFIGS["llama"]), CONFIGS["llama"])
    assert_params_equal(from_tensors(Recorded(tensors), CONFIGS["llama"], place), random_params(CONFIGS["llama"]))
    assert events == ["read", "place"] * len(tensors)


@pytest.mark.parametrize("shape", [{"data": 4}, {"fsdp": 2, "tensor": 2}], ids=["whole", "cut"])
def test_parameters_are_read_onto_the_devices_of_a_mesh(saved, shape):
    mesh = make_mesh(jax.devices()[:4], shape)
    params = load_policy(saved / "llama", mesh=mesh).params
    assert_params_equal(params, random_params(CONFIGS["llama"]))
    kernel = params["block_0"]["mlp"]["up"]["kernel"]
    assert len(kernel.sharding.device_set) == 4
    assert kernel.addressable_shards[0].data.size * (1 if "data" in shape else 4) == kernel.size
    jax.tree.map(lambda x, y: x.sharding == y.sharding or pytest.fail(), params, put_model(params, mesh))


def test_matrices_that_are_not_learned_take_half_the_memory(saved):
    params = load_policy(saved / "qwen2", params_dtype="bfloat16").params

    def check(x, exact):
        assert x.dtype == ("bfloat16" if x.ndim > 1 else "float32")
        np.testing.assert_array_equal(x, exact.astype(x.dtype))

    jax.tree.map(check, params, random_params(CONFIGS["qwen2"]))


def test_what_ends_a_completion_is_written_and_read(tmp_path):
    policy = Policy(random_params(CONFIGS["llama"]), CONFIGS["llama"], tokenizer(), (0, 5, 9))
    save_policy(tmp_path, policy)
    generation = tmp_path / "generation_config.json"
    assert json.loads(generation.read_text()) == {"eos_token_id": [0, 5, 9]}
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [0, 5, 9]
    assert load_policy(tmp_path).ends == (0, 5, 9)
    for said, ends in (([9, 7, 7], (0, 7, 9)), (3, (0, 3)), (0, (0,)), (None, (0, 5, 9)), ([259, 260], (0, 259))):
        generation.write_text(json.dumps({"eos_token_id": said, "temperature": 0.6, "do_sample": True}))
        assert load_policy(tmp_path).ends == ends
    save_policy(tmp_path, load_policy(tmp_path))
    assert json.loads(generation.read_text()) == {"eos_token_id": [0, 259]}
    generation.unlink()
    assert load_policy(tmp_path).ends == (0, 259)  # of config.json
    save_policy(tmp_path, policy._replace(eos=()))
    assert json.loads(generation.read_text()) == {"eos_token_id": 0}
    for spoilt in ('"0"', "[true]", "-1", "{}", "1.5"):
        generation.write_text('{"eos_token_id": ' + spoilt + "}")
        with pytest.raises(InputError, match=f"{generation}.*eos_token_id"):
            load_policy(tmp_path)


def test_a_tokenizer_without_an_end_gets_it_from_the_configuration(tmp_path):
    words = copy.deepcopy(tokenizer())
    words.eos_token = None
    save_policy(tmp_path, Policy(random_params(CONFIGS["llama"]), CONFIGS["llama"], words, (7, 5)))
    policy = load_policy(tmp_path)
    assert policy.ends == (5, 7) and policy.tokenizer.eos_token_id == 5
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps(settings | {"eos_token_id": None}))
    with pytest.raises(InputError, match="no end-of-sequence token"):
        load_policy(tmp_path)


def test_the_chat_template_goes_with_the_policy(tmp_path):
    for folder in (tmp_path / "first", tmp_path / "second"):
        words = with_template() if folder.name == "first" else load_policy(tmp_path / "first").tokenizer
        save_policy(folder, Policy(random_params(CONFIGS["llama"]), CONFIGS["llama"], words))
    assert load_policy(tmp_path / "second").tokenizer.chat_template == with_template().chat_template


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
    with pytest.raises(InputError, match=r"There is no folder .*nowhere\."):
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
