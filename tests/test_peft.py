"""Adapters on disk: names, shapes and scales of PEFT, there and back; and files that are damaged or of another kind."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.config import gpt2, llama
from rl_jax.models.huggingface import Policy, load_policy, save_policy
from rl_jax.models.lora import LoRA, init_adapters, merge_adapters, with_adapters
from rl_jax.models.peft import load_adapters, read_settings, save_adapters
from rl_jax.models.transformer import init_params

LLAMA = llama(24, 32, layers=2, width=12, heads=2, kv_heads=1, mlp_width=20)
GPT2 = gpt2(24, 32, layers=2, width=12, heads=4)
RNG = np.random.default_rng(0)
UP, FUSED = "base_model.model.model.layers.1.mlp.up_proj", "base_model.model.transformer.h.1.attn.c_attn"


def random_adapters(config, rank=3, targets=("all",)):
    adapters = init_adapters(jax.random.key(0), config, rank, targets)
    return jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), adapters)


def write(folder, tensors, **settings):
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"} | settings
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def pair(name, rows, columns, rank=2):
    shapes = {"A": (rank, rows), "B": (columns, rank)}
    return {f"{name}.lora_{x}.weight": RNG.normal(size=shape).astype(np.float32) for x, shape in shapes.items()}


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("targets", [("all",), ("value", "query", "down"), ("key",)])
def test_there_and_back(config, targets, tmp_path):
    adapters = random_adapters(config, targets=targets)
    save_adapters(tmp_path, {**adapters, "value_head": {"bias": np.zeros(1)}}, LoRA(3, alpha=4.5), config, "base")
    found = load_adapters(tmp_path, config)
    fused = config == GPT2
    for block, parts in adapters.items():
        for part, layers in parts.items():
            assert set(found[block][part]) - set(layers) <= {"query", "key", "value"}
            for name, layer in found[block][part].items():  # GPT-2's are as wide as the fused one, and as many
                change = layer["lora_a"] @ layer["lora_b"]
                wanted = 1.5 * layers[name]["lora_a"] @ layers[name]["lora_b"] if name in layers else 0 * change
                np.testing.assert_allclose(change, wanted, atol=1e-5)
                assert fused or layer["lora_a"].shape[1] == 3
    settings = read_settings(tmp_path)
    assert settings["base_model_name_or_path"] == "base" and settings["task_type"] == "CAUSAL_LM"
    assert (settings["r"], settings["lora_alpha"], settings["fan_in_fan_out"]) == (3, 4.5, fused)


def test_names_and_shapes_of_llama(tmp_path):
    adapters = random_adapters(LLAMA)
    save_adapters(tmp_path, adapters, LoRA(3), LLAMA)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {"self_attn.q_proj": (12, 12), "self_attn.k_proj": (12, 6), "self_attn.v_proj": (12, 6)}
    shapes |= {"self_attn.o_proj": (12, 12), "mlp.gate_proj": (12, 20), "mlp.up_proj": (12, 20)}
    shapes |= {"mlp.down_proj": (20, 12)}
    expected = {}
    for layer in range(2):
        for name, (rows, columns) in shapes.items():
            expected[f"base_model.model.model.layers.{layer}.{name}.lora_A.weight"] = (3, rows)
            expected[f"base_model.model.model.layers.{layer}.{name}.lora_B.weight"] = (columns, 3)
    assert {name: x.shape for name, x in tensors.items()} == expected
    np.testing.assert_array_equal(tensors[f"{UP}.lora_A.weight"], adapters["block_1"]["mlp"]["up"]["lora_a"].T)
    np.testing.assert_array_equal(tensors[f"{UP}.lora_B.weight"], adapters["block_1"]["mlp"]["up"]["lora_b"].T)
    settings = read_settings(tmp_path)
    assert settings["target_modules"] == sorted(shapes) and settings["rank_pattern"] == {}
    assert settings["lora_alpha"] == 6 and settings["base_model_name_or_path"] is None


def test_the_fused_matrix_of_gpt2_has_a_block_for_each(tmp_path):
    adapters = random_adapters(GPT2, targets=("query", "value"))
    save_adapters(tmp_path, adapters, LoRA(3), GPT2)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    low, high = (tensors[f"{FUSED}.lora_{x}.weight"] for x in "AB")
    change, parts = high @ low, adapters["block_1"]["attention"]
    for rows, name in ((slice(0, 12), "query"), (slice(24, 36), "value")):
        np.testing.assert_allclose(change[rows], (parts[name]["lora_a"] @ parts[name]["lora_b"]).T, atol=1e-5)
    assert not change[12:24].any()
    settings = read_settings(tmp_path)
    assert (settings["rank_pattern"], settings["alpha_pattern"]) == ({"attn.c_attn": 6}, {"attn.c_attn": 12.0})
    assert settings["target_modules"] == ["attn.c_attn"]


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"up_proj": 5}}, 2.5),
        ({"alpha_pattern": {"layers.0.mlp.up_proj": 5, "proj": 7}}, 3.0),
        ({"rank_pattern": {"up_proj": 2}, "r": 64}, 3.0),
    ],
)
def test_theirs_are_multiplied_by_their_own_scale(settings, scale, tmp_path):
    tensors = pair(UP, 12, 20)
    found = load_adapters(write(tmp_path, tensors, **settings), LLAMA)
    assert list(found) == ["block_1"] and list(found["block_1"]["mlp"]) == ["up"]
    base = {"block_1": {"mlp": {"up": {"kernel": np.zeros((12, 20))}}}}
    layer = with_adapters(base, found, 1.0)["block_1"]["mlp"]["up"]
    wanted = scale * (tensors[f"{UP}.lora_B.weight"] @ tensors[f"{UP}.lora_A.weight"]).T
    np.testing.assert_allclose(layer["lora_a"] @ layer["lora_b"], wanted, rtol=1e-5, atol=1e-6)


def test_their_fused_adapters_are_each_parts(tmp_path):
    tensors = pair(FUSED, 12, 36)
    found = load_adapters(write(tmp_path, tensors), GPT2)["block_1"]["attention"]
    wanted = 3.0 * (tensors[f"{FUSED}.lora_B.weight"] @ tensors[f"{FUSED}.lora_A.weight"]).T
    for number, name in enumerate(("query", "key", "value")):
        change = found[name]["lora_a"] @ found[name]["lora_b"]
        np.testing.assert_allclose(change, wanted[:, 12 * number : 12 * number + 12], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (pair(UP, 12, 20), {"peft_type": "IA3"}, "peft_type = 'IA3' are not supported; only 'LORA'"),
        (pair(UP, 12, 20), {"use_dora": True}, "use_dora = True"),
        (pair(UP, 12, 20), {"bias": "all"}, "bias = 'all'"),
        (pair(UP, 12, 20), {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (pair(UP, 12, 20), {"lora_alpha": None}, "alpha is None"),
        (pair(UP, 12, 20), {"lora_alpha": 1e999}, "alpha is inf"),
        (pair(UP, 12, 20), {"alpha_pattern": {"^.*up_proj": 3}}, "patterns are not supported"),
        (pair(UP, 12, 21), {}, r"has shape \(21, 2\); .* asks for \(20, 2\)"),
        (pair(UP, 11, 20), {}, r"has shape \(2, 11\)"),
        ({**pair(UP, 12, 20, 2), f"{UP}.lora_B.weight": np.ones((20, 3), np.float32)}, {}, r"\(20, 3\)"),
        ({f"{UP}.lora_A.weight": np.ones((2, 12), np.float32)}, {}, "lora_B.weight has shape"),
        ({f"{UP}.lora_A.weight": np.float32(1)}, {}, "cannot be read|has shape"),
        ({name: np.full_like(x, np.nan) for name, x in pair(UP, 12, 20).items()}, {}, "not finite"),
        (pair(UP.replace("layers.1", "layers.2"), 12, 20), {}, "layers.2.mlp.up_proj.lora_A.weight', which is of no"),
        (pair(UP, 12, 20) | pair("base_model.model.lm_head", 12, 24), {}, "lm_head.lora_A.weight'"),
        ({}, {}, "which is of no layer"),
    ],
)
def test_files_that_are_refused(tensors, settings, message, tmp_path):
    write(tmp_path, {name: np.asarray(x) for name, x in tensors.items()}, **settings)
    with pytest.raises(InputError, match=message) as error:
        load_adapters(tmp_path, LLAMA)
    assert re.search(r"adapter_(config.json|model.safetensors)", str(error.value))


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(InputError, match=r"adapter_config.json cannot be read"):
        load_adapters(tmp_path, LLAMA)
    write(tmp_path, pair(UP, 12, 20))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match=r"no adapter_model.safetensors; adapters are read from safetensors alone"):
        load_adapters(tmp_path, LLAMA)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(InputError, match=r"adapter_model.safetensors cannot be read"):
        load_adapters(tmp_path, LLAMA)
    for text in ("[]", "{", "\xff"):
        (tmp_path / "adapter_config.json").write_text(text, "latin-1")
        with pytest.raises(InputError, match=r"adapter_config.json"):
            load_adapters(tmp_path, LLAMA)


def test_a_folder_of_adapters_is_read_as_the_model_that_it_names(tmp_path):
    config = llama(260, 32, layers=1, width=12, heads=2)
    policy = Policy(init_params(jax.random.key(1), config), config, train_tokenizer(["the cat sat on the mat"], 260))
    adapters, base = random_adapters(config), save_policy(tmp_path / "base", policy)
    save_adapters(tmp_path / "adapters", adapters, LoRA(3, alpha=4.5), config, base)
    expected = merge_adapters(policy.params, adapters, 1.5)
    found = load_policy(tmp_path / "adapters")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found.params, expected)
    assert found.place == base
    save_adapters(tmp_path / "lost", adapters, LoRA(3), config)
    with pytest.raises(InputError, match="must name a model as base_model_name_or_path, not None"):
        load_policy(tmp_path / "lost")
