"""Policies on disk, in the layout that `transformers` loads: config.json, model.safetensors, tokenizer files.

The families are GPT-2, Llama, Qwen 2 (Llama with biases on queries, keys and values) and Qwen 3 (Llama with
normalised queries and keys). No weights are unpickled, and no code that comes with a model runs.
"""

import contextlib
import dataclasses
import json
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from rl_jax.errors import InputError
from rl_jax.models.transformer import TransformerConfig, gpt2, init_params, llama
from rl_jax.run.processes import is_first
from rl_jax.run.spmd import fetch
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
MOST = 2**31 - 1  # of any size in a config.json: tokens and positions are int32


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


def _name(module: str, is_gpt2: bool) -> str | None:
    """The name there of a module here; None for GPT-2's fused projection, and for what the Transformer has not."""
    layer_names, rest, prefix = (GPT2_LAYER, GPT2_REST, "h") if is_gpt2 else (LLAMA_LAYER, LLAMA_REST, "model.layers")
    block, _, part = module.partition("/")
    if not part:
        return rest.get(module)
    return f"{prefix}.{block.removeprefix('block_')}.{layer_names[part]}" if part in layer_names else None


def _parameters(config: TransformerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Path and shape of each parameter; one layer after another, since a config.json can ask for any number of them."""
    one = dataclasses.replace(config, layers=1)
    leaves: dict[str, Any] = flatten_dict(jax.eval_shape(lambda: init_params(jax.random.key(0), one)), sep="/")
    block = {path.removeprefix("block_0/"): x.shape for path, x in leaves.items() if path.startswith("block_0/")}
    yield from ((path, x.shape) for path, x in leaves.items() if not path.startswith("block_0/"))
    for layer in range(config.layers):
        yield from ((f"block_{layer}/{path}", shape) for path, shape in block.items())


def to_tensors(params: PyTree, config: TransformerConfig) -> dict[str, np.ndarray]:
    """Parameters as named tensors of `transformers`, float32."""
    flat = {path: np.asarray(x, np.float32) for path, x in flatten_dict(params, sep="/").items()}
    is_gpt2 = family(config) == "gpt2"
    tensors = {}
    for path, value in flat.items():
        module, leaf = path.rsplit("/", 1)
        if name := _name(module, is_gpt2):
            value = value.T if leaf == "kernel" and not is_gpt2 else value
            tensors[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"] = np.ascontiguousarray(value)
    if is_gpt2:
        for layer in range(config.layers):
            for leaf, name in (("kernel", "weight"), ("bias", "bias")):
                fused = [flat[f"block_{layer}/attention/{part}/{leaf}"] for part in ("query", "key", "value")]
                tensors[f"h.{layer}.attn.c_attn.{name}"] = np.concatenate(fused, axis=-1)
    return tensors


def from_tensors(tensors: Mapping[str, np.ndarray], config: TransformerConfig) -> PyTree:
    """Named tensors of `transformers` as parameters.

    Raises:
        InputError: a tensor is missing, has another shape than the configuration says, or holds other than finite
            floating-point numbers.
    """
    is_gpt2 = family(config) == "gpt2"
    flat = {}
    for path, wanted in _parameters(config):
        module, leaf = path.rsplit("/", 1)
        suffix = "bias" if leaf == "bias" else "weight"
        block, _, part = module.partition("/attention/")
        fused = is_gpt2 and part in ("query", "key", "value")
        name = f"h.{block.removeprefix('block_')}.attn.c_attn" if fused else _name(module, is_gpt2)
        name = f"{name}.{suffix}"
        value = tensors.get(name, tensors.get(f"transformer.{name}"))
        if value is None:
            raise InputError(
                f"The model's weights lack the tensor {name}, which its config.json asks for; copy or train it again."
            )
        shape = (*wanted[:-1], 3 * wanted[-1]) if fused else wanted
        shape = shape[::-1] if leaf == "kernel" and not is_gpt2 else shape
        value = read_tensor(name, value, shape)
        if fused:
            value = np.split(value, 3, axis=-1)[("query", "key", "value").index(part)]
        value = value.T if leaf == "kernel" and not is_gpt2 else value
        flat[path] = jnp.array(value)
    return unflatten_dict(flat, sep="/")


def read_tensor(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of a file as float32.

    Raises:
        InputError: it has another shape, another kind of numbers, or some that are not finite.
    """
    again = "copy or train it again"
    if value.shape != shape:
        raise InputError(f"The tensor {name} has shape {value.shape}; its config.json asks for {shape}: {again}.")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise InputError(f"The tensor {name} holds {value.dtype}, not floating-point numbers: {again}.")
    with np.errstate(over="ignore"):
        value = np.asarray(value, np.float32)
    if not np.isfinite(value).all():
        raise InputError(f"The tensor {name} has numbers that are not finite in float32: {again}.")
    return value


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
        InputError: a family, an activation or a rotary scaling that the Transformer here does not have, or a setting
            that is missing, of the wrong type, or out of range.
    """
    if not isinstance(settings, Mapping):
        raise InputError("The model's config.json holds no JSON object; copy or train it again.")
    name = settings.get("model_type")
    if name not in ("gpt2", "llama", "qwen2", "qwen3"):
        raise InputError(f"Models of type {reprlib.repr(name)} are not supported; gpt2, llama, qwen2 and qwen3 are.")
    try:
        config = _from_gpt2(settings) if name == "gpt2" else _from_llama(settings)
    except KeyError as error:
        raise InputError(f"The model's config.json lacks {error}; copy or train it again.") from error
    if config.heads * config.head_size > MOST:
        raise InputError(f"The model's config.json asks for {config.heads} heads of {config.head_size}: copy it again.")
    return config


def _from_gpt2(settings: Mapping[str, Any]) -> TransformerConfig:
    _require(settings, "activation_function", "gelu_new")
    _require(settings, "tie_word_embeddings", True)
    _require(settings, "scale_attn_weights", True)
    _require(settings, "scale_attn_by_inverse_layer_idx", False)
    vocab_size, context, layers, width, heads = (
        _size(settings, name) for name in ("vocab_size", "n_positions", "n_layer", "n_embd", "n_head")
    )
    epsilon = _positive(settings, "layer_norm_epsilon", 1e-5)
    mlp_width = _size(settings, "n_inner", 4 * width)
    return gpt2(vocab_size, context, layers, width, heads, norm_epsilon=epsilon, mlp_width=mlp_width)


def _from_llama(settings: Mapping[str, Any]) -> TransformerConfig:
    _require(settings, "hidden_act", "silu")
    _require(settings, "attention_bias", False)
    _require(settings, "mlp_bias", False)
    _require(settings, "use_sliding_window", False)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise _wrong("rope_parameters", rope, "an object")
    _require(rope, "rope_type", "default")
    _require(rope, "type", "default")  # its name in older files
    _require(rope, "partial_rotary_factor", 1.0)
    vocab_size, context, layers, width, heads = (
        _size(settings, name)
        for name in (
            "vocab_size",
            "max_position_embeddings",
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
        )
    )
    tied = settings.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise _wrong("tie_word_embeddings", tied, "true or false")
    return llama(
        vocab_size,
        context,
        layers,
        width,
        heads,
        kv_heads=_size(settings, "num_key_value_heads", heads),
        head_size=_size(settings, "head_dim", width // heads),
        mlp_width=_size(settings, "intermediate_size"),
        norm_epsilon=_positive(settings, "rms_norm_eps"),
        rope_theta=_positive(rope if "rope_theta" in rope else settings, "rope_theta", 10_000.0),
        tied=tied,
        qkv_bias=settings["model_type"] == "qwen2",
        qk_norm=settings["model_type"] == "qwen3",
    )


def _size(settings: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A whole number from 1 to `MOST`; without a default the setting must be there."""
    value = settings[name] if default is None else settings.get(name)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= MOST:
        raise _wrong(name, value, f"a whole number from 1 to {MOST}")
    return value


def _positive(settings: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive number of float32; without a default the setting must be there."""
    value = settings[name] if default is None else settings.get(name, default)
    if type(value) not in (int, float) or not 0 < value < 1e38:
        raise _wrong(name, value, "a positive number")
    return float(value)


def _wrong(name: str, value: Any, wanted: str) -> InputError:
    shown = reprlib.repr(value)
    return InputError(f"The model's config.json has {name} = {shown}; it must be {wanted}: copy or train it again.")


def _require(settings: Mapping[str, Any], name: str, value: Any) -> None:
    if settings.get(name, value) != value:
        shown = reprlib.repr(settings[name])
        raise InputError(f"Models with {name} = {shown} are not supported; only {value!r} is.")


def save_policy(folder: Path, policy: Policy) -> None:
    """Write a policy so that `transformers` and `load_policy` read it: the first process does, and all have to ask."""
    from rl_jax.data.tokenizer import save_tokenizer  # slow to import

    params = fetch(policy.params)
    if not is_first():
        return
    settings = to_settings(policy.config, policy.tokenizer.eos_token_id, policy.tokenizer.bos_token_id)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder, policy.tokenizer)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    save_file(to_tensors(params, policy.config), folder / "model.safetensors", metadata={"format": "pt"})


def load_policy(folder: Path, dtype: Literal["float32", "bfloat16"] = "float32", remat: bool = False) -> Policy:
    """Read a policy that `save_policy` or `transformers` wrote.

    Args:
        folder: holds config.json, model.safetensors and the tokenizer.
        dtype: the compute dtype; parameters are float32.
        remat: recompute blocks in the backward pass.

    Raises:
        InputError: the folder is not a policy, or one of a kind that is not supported.
    """
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a policy: it has no {name}. Give the policy folder of a run.")
    config, tensors = read_model(folder, dtype, remat)
    tokenizer = read_tokenizer(folder, config)
    with reading(folder / "model.safetensors"):
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
    with reading(folder / "config.json"):
        settings = json.loads((folder / "config.json").read_text("utf-8"))
        config = dataclasses.replace(from_settings(settings), dtype=dtype, remat=remat)
    with reading(folder / "model.safetensors"):
        return config, load_file(folder / "model.safetensors")


def read_tokenizer(folder: Path, config: TransformerConfig) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        InputError: there is none that can be read, it cannot end a completion, or it has tokens the model does not.
    """
    from rl_jax.data.tokenizer import load_tokenizer  # slow to import

    tokenizer = load_tokenizer(folder)
    if not isinstance(tokenizer.eos_token_id, int):
        raise InputError(
            f"The tokenizer in {folder} has no end-of-sequence token, which is what ends a completion: name one as "
            "eos_token in its tokenizer_config.json."
        )
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    if tokens > config.vocab_size:
        raise InputError(
            f"The tokenizer in {folder} has {tokens} tokens, and the model a vocabulary of {config.vocab_size}: take "
            "the tokenizer that the model was trained with."
        )
    return tokenizer


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever is wrong with a file that is read in here is an `InputError` that names it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except MemoryError:  # no fault of the file's
        raise
    except Exception as error:  # files of others can break a reader in any way
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} cannot be read ({why}); copy or train it again.") from error
