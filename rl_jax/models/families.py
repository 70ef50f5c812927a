"""A model's config.json, as `transformers` writes it, and the configuration that it stands for.

The families are GPT-2, Llama, Qwen 2 (Llama with biases on queries, keys and values) and Qwen 3 (Llama with
normalised queries and keys).
"""

import reprlib
from collections.abc import Mapping
from typing import Any, Literal

from rl_jax.errors import InputError
from rl_jax.models.transformer import TransformerConfig, gpt2, llama

Family = Literal["gpt2", "llama", "qwen2", "qwen3"]
MOST = 2**31 - 1  # of any size in a config.json: tokens and positions are int32


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
