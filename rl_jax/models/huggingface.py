"""Policies on disk, in the layout that `transformers` loads: config.json, model.safetensors, tokenizer files.

The families are GPT-2, Llama, Qwen 2 (Llama with biases on queries, keys and values) and Qwen 3 (Llama with
normalised queries and keys). No weights are unpickled, and no code that comes with a model runs.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rl_jax.errors import InputError
from rl_jax.models.transformer import TransformerConfig, gpt2, init_params, llama
from rl_jax.types import PyTree

Family = Literal["gpt2", "llama", "qwen2", "qwen3"]

# Our path in a block -> the name in a layer there. Kernels are [in, out] here and in GPT-2, [out, in] in Llama.
GPT2_LAYER = {
    "attention_norm": "ln_1",
    "attention/out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}
GPT2_REST = {"embedding": "wte", "position_embedding": "wpe", "final_norm": "ln_f"}
LLAMA_LAYER = {
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
LLAMA_REST = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head"}


class Policy(NamedTuple):
    """A language model: parameters, configuration, and tokenizer."""

    params: PyTree
    config: TransformerConfig
    tokenizer: Any


def family(config: TransformerConfig) -> Family:
    """The family that a configuration belongs to; InputError where `transformers` has none like it."""
    shape = (config.vocab_size, config.context, config.layers, config.width, config.heads)
    free = {name: getattr(config, name) for name in ("mlp_width", "norm_epsilon", "dtype", "remat")}
    if config.positions == "learned" and config == gpt2(*shape, **free):
        return "gpt2"
    free |= {name: getattr(config, name) for name in ("kv_heads", "head_size", "tied", "rope_theta")}
    families: dict[Family, dict[str, bool]] = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
    for name, changes in families.items():
        if config == llama(*shape, **free, **changes):
            return name
    raise InputError(f"Only GPT-2, Llama, Qwen 2 and Qwen 3 models can be saved; this is none of them: {config}.")


def _pairs(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    """Our module path and its name there, for every module but GPT-2's fused projection."""
    is_gpt2 = family(config) == "gpt2"
    layer_names, rest, layer_prefix = (
        (GPT2_LAYER, GPT2_REST, "h") if is_gpt2 else (LLAMA_LAYER, LLAMA_REST, "model.layers")
    )
    yield from rest.items()
    for layer in range(config.layers):
        for ours, theirs in layer_names.items():
            yield f"block_{layer}/{ours}", f"{layer_prefix}.{layer}.{theirs}"


def to_tensors(params: PyTree, config: TransformerConfig) -> dict[str, np.ndarray]:
    """Parameters as named tensors of `transformers`, float32."""
    flat = {path: np.asarray(x, np.float32) for path, x in flatten_dict(params, sep="/").items()}
    transposed = family(config) != "gpt2"
    tensors = {}
    for ours, theirs in _pairs(config):
        for leaf, name in (("scale", "weight"), ("embedding", "weight"), ("kernel", "weight"), ("bias", "bias")):
            if (value := flat.get(f"{ours}/{leaf}")) is not None:
                value = value.T if transposed and leaf == "kernel" else value
                tensors[f"{theirs}.{name}"] = np.ascontiguousarray(value)
    if not transposed:
        for layer in range(config.layers):
            for leaf, name in (("kernel", "weight"), ("bias", "bias")):
                fused = [flat[f"block_{layer}/attention/{part}/{leaf}"] for part in ("query", "key", "value")]
                tensors[f"h.{layer}.attn.c_attn.{name}"] = np.concatenate(fused, axis=-1)
    return tensors


def from_tensors(tensors: Mapping[str, np.ndarray], config: TransformerConfig) -> PyTree:
    """Named tensors of `transformers` as parameters.

    Raises:
        InputError: a tensor is missing or has another shape than the configuration says.
    """
    expected: dict[str, Any] = flatten_dict(jax.eval_shape(lambda: init_params(jax.random.key(0), config)), sep="/")
    is_gpt2 = family(config) == "gpt2"
    names = dict(_pairs(config))
    flat = {}
    for path, wanted in expected.items():
        module, leaf = path.rsplit("/", 1)
        suffix = "bias" if leaf == "bias" else "weight"
        block, _, part = module.partition("/attention/")
        fused = is_gpt2 and part in ("query", "key", "value")
        name = f"h.{block.removeprefix('block_')}.attn.c_attn.{suffix}" if fused else f"{names[module]}.{suffix}"
        value = tensors.get(name, tensors.get(f"transformer.{name}"))
        if value is None:
            raise InputError(f"The model's weights lack the tensor {name}, which its config.json asks for.")
        shape = (*wanted.shape[:-1], 3 * wanted.shape[-1]) if fused else wanted.shape
        shape = shape[::-1] if leaf == "kernel" and not is_gpt2 else shape
        if value.shape != shape:
            raise InputError(f"The tensor {name} has shape {value.shape}; its config.json asks for {shape}.")
        if fused:
            value = np.split(value, 3, axis=-1)[("query", "key", "value").index(part)]
        value = value.T if leaf == "kernel" and not is_gpt2 else value
        flat[path] = jnp.array(value, jnp.float32)
    return unflatten_dict(flat, sep="/")


def to_settings(config: TransformerConfig, eos_token_id: int, bos_token_id: int | None = None) -> dict[str, Any]:
    """The model's configuration as the dict of a `transformers` config.json."""
    common = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tied, "dtype": "float32"}
    common |= {"bos_token_id": eos_token_id if bos_token_id is None else bos_token_id, "eos_token_id": eos_token_id}
    name = family(config)
    if name == "gpt2":
        return common | {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_positions": config.context,
            "n_layer": config.layers,
            "n_embd": config.width,
            "n_head": config.heads,
            "n_inner": config.mlp_width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_epsilon,
        }
    return common | {
        "architectures": [f"{name.capitalize()}ForCausalLM"],
        "model_type": name,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def from_settings(settings: Mapping[str, Any]) -> TransformerConfig:
    """The dict of a `transformers` config.json as the model's configuration.

    Raises:
        InputError: a family, an activation or a rotary scaling that the Transformer here does not have.
    """
    if not isinstance(settings, Mapping):
        raise InputError("The model's config.json holds no JSON object.")
    name = settings.get("model_type")
    if name not in ("gpt2", "llama", "qwen2", "qwen3"):
        raise InputError(f"Models of type {name!r} are not supported; gpt2, llama, qwen2 and qwen3 are.")
    try:
        return _from_gpt2(settings) if name == "gpt2" else _from_llama(settings)
    except KeyError as error:
        raise InputError(f"The model's config.json lacks {error}.") from error
    except TypeError as error:
        raise InputError(f"The model's config.json has a setting of the wrong type ({error}).") from error


def _from_gpt2(settings: Mapping[str, Any]) -> TransformerConfig:
    _require(settings, "activation_function", "gelu_new")
    _require(settings, "tie_word_embeddings", True)
    _require(settings, "scale_attn_weights", True)
    _require(settings, "scale_attn_by_inverse_layer_idx", False)
    shape = [settings[name] for name in ("vocab_size", "n_positions", "n_layer", "n_embd", "n_head")]
    epsilon = settings.get("layer_norm_epsilon", 1e-5)
    return gpt2(*shape, norm_epsilon=epsilon, mlp_width=settings.get("n_inner") or 4 * settings["n_embd"])


def _from_llama(settings: Mapping[str, Any]) -> TransformerConfig:
    _require(settings, "hidden_act", "silu")
    _require(settings, "attention_bias", False)
    _require(settings, "mlp_bias", False)
    _require(settings, "use_sliding_window", False)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    _require(rope, "rope_type", "default")
    _require(rope, "type", "default")  # its name in older files
    _require(rope, "partial_rotary_factor", 1.0)
    heads, width = settings["num_attention_heads"], settings["hidden_size"]
    vocab_size, context, layers = (
        settings[name] for name in ("vocab_size", "max_position_embeddings", "num_hidden_layers")
    )
    return llama(
        vocab_size,
        context,
        layers,
        width,
        heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head_size=settings.get("head_dim") or width // heads,
        mlp_width=settings["intermediate_size"],
        norm_epsilon=settings["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta", settings.get("rope_theta", 10_000.0))),
        tied=settings.get("tie_word_embeddings", False),
        qkv_bias=settings["model_type"] == "qwen2",
        qk_norm=settings["model_type"] == "qwen3",
    )


def _require(settings: Mapping[str, Any], name: str, value: Any) -> None:
    if settings.get(name, value) != value:
        raise InputError(f"Models with {name} = {settings[name]!r} are not supported; only {value!r} is.")


def save_policy(folder: Path, policy: Policy) -> None:
    """Write a policy so that `transformers` and `load_policy` read it."""
    settings = to_settings(policy.config, policy.tokenizer.eos_token_id, policy.tokenizer.bos_token_id)
    folder.mkdir(parents=True, exist_ok=True)
    policy.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    save_file(to_tensors(policy.params, policy.config), folder / "model.safetensors", metadata={"format": "pt"})


def load_policy(folder: Path, dtype: Literal["float32", "bfloat16"] = "float32", remat: bool = False) -> Policy:
    """Read a policy that `save_policy` or `transformers` wrote.

    Args:
        folder: holds config.json, model.safetensors and the tokenizer.
        dtype: the compute dtype; parameters are float32.
        remat: recompute blocks in the backward pass.

    Raises:
        InputError: the folder is not a policy, or one of a kind that is not supported.
    """
    from rl_jax.data.tokenizer import load_tokenizer  # slow to import

    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a policy: it has no {name}. Give the policy folder of a run.")
    config, tensors = read_model(folder, dtype, remat)
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer in {folder} has no end-of-sequence token, which is what ends a completion.")
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens, and the model a vocabulary of {config.vocab_size}."
        )
    return Policy(from_tensors(tensors, config), config, tokenizer)


def read_model(
    folder: Path, dtype: Literal["float32", "bfloat16"] = "float32", remat: bool = False
) -> tuple[TransformerConfig, dict[str, np.ndarray]]:
    """The configuration and the named tensors in a model's folder.

    Raises:
        InputError: there is no model, one that is damaged, or one of a kind that is not supported.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a model: it has no {name}. Copy or train it again.")
    try:
        settings = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{folder / 'config.json'} cannot be read ({error}); copy or train it again.") from error
    config = dataclasses.replace(from_settings(settings), dtype=dtype, remat=remat)
    try:
        return config, load_file(folder / "model.safetensors")
    except SafetensorError as error:
        raise InputError(f"{folder / 'model.safetensors'} cannot be read ({error}); copy or train it again.") from error
