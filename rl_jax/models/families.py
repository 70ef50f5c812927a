"""A model's config.json, as `transformers` writes it, and the configuration that it stands for.

A family is a pair of functions, one from the settings of a config.json and one to them. Whatever a file asks for that
the Transformer here does not do is refused by name.
"""

import contextlib
import dataclasses
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rl_jax.errors import InputError
from rl_jax.models.config import TransformerConfig, gpt2, llama
from rl_jax.models.rope_settings import read_rope, write_rope
from rl_jax.models.settings import MOST, Settings, positive, require, size, truth, wrong


class Family(NamedTuple):
    """How one family's config.json is read and written, and what its classes are called there."""

    read: Callable[[Settings], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]
    model: str
    classifier: str


def family(config: TransformerConfig) -> str:
    """The family whose config.json can say a configuration; InputError where `transformers` has none like it."""
    plain = dataclasses.replace(config, dtype="float32", remat=False)
    for name, each in FAMILIES.items():
        with contextlib.suppress(InputError):
            if each.read({"model_type": name} | each.write(plain)) == plain:
                return name
    raise InputError(f"Models of {', '.join(FAMILIES)} can be saved; this is none of them: {config}.")


def to_settings(
    config: TransformerConfig, eos_token_id: int | Sequence[int], bos_token_id: int | None = None
) -> dict[str, Any]:
    """The model's configuration as the dict of a `transformers` config.json."""
    name = family(config)
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    tokens = {
        "bos_token_id": ends[0] if bos_token_id is None else bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
    }
    about = {"architectures": [FAMILIES[name].model], "model_type": name, "dtype": "float32"}
    return about | tokens | FAMILIES[name].write(config)


def from_settings(settings: Settings) -> TransformerConfig:
    """The dict of a `transformers` config.json as the model's configuration.

    Raises:
        InputError: a family, an activation or a rotary scaling that the Transformer here does not have, or a setting
            that is missing, of the wrong type, or out of range.
    """
    name = settings.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"Models of type {reprlib.repr(name)} are not supported; {', '.join(FAMILIES)} are.")
    require(settings, "quantization_config", None)
    try:
        config = FAMILIES[name].read(settings)
    except KeyError as error:
        raise InputError(f"The model's config.json lacks {error}; copy or train it again.") from error
    if config.heads * config.head_size > MOST:
        raise InputError(f"The model's config.json asks for {config.heads} heads of {config.head_size}: copy it again.")
    return config


def _read_gpt2(settings: Settings) -> TransformerConfig:
    require(settings, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    require(settings, "tie_word_embeddings", True)
    require(settings, "scale_attn_weights", True)
    require(settings, "scale_attn_by_inverse_layer_idx", False)
    vocab_size, context, layers, width, heads = (
        size(settings, name) for name in ("vocab_size", "n_positions", "n_layer", "n_embd", "n_head")
    )
    epsilon = positive(settings, "layer_norm_epsilon", 1e-5)
    mlp_width = size(settings, "n_inner", 4 * width)
    return gpt2(vocab_size, context, layers, width, heads, norm_epsilon=epsilon, mlp_width=mlp_width)


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": True,
        "n_positions": config.context,
        "n_layer": config.layers,
        "n_embd": config.heads * config.head_size,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_epsilon,
    }


def read_decoder(
    settings: Settings, own: Mapping[str, Any], *, activation: str = "silu", head_size: int = 0, tied: bool = False
) -> TransformerConfig:
    """What the families after GPT-2 have in common, and what is a family's own."""
    require(settings, "hidden_activation" if "hidden_activation" in settings else "hidden_act", activation)
    names = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads")
    vocab_size, context, layers, width, heads = (size(settings, name) for name in names)
    shared = {
        "kv_heads": size(settings, "num_key_value_heads", heads),
        "head_size": size(settings, "head_dim", head_size or max(width // heads, 1)),
        "mlp_width": size(settings, "intermediate_size"),
        "norm_epsilon": positive(settings, "rms_norm_eps"),
        "tied": truth(settings, "tie_word_embeddings", tied),
    }
    return llama(vocab_size, context, layers, width, heads, **shared, **read_rope(settings, context), **own)


def write_decoder(config: TransformerConfig, activation: str = "silu") -> dict[str, Any]:
    """What `read_decoder` reads."""
    return {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.context,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.mlp_width,
        "hidden_act": activation,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": write_rope(config),
    }


def _read_llama(settings: Settings) -> TransformerConfig:
    return read_decoder(settings, _attention_bias(settings) | {"mlp_bias": truth(settings, "mlp_bias", False)})


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
    return write_decoder(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _read_mistral(settings: Settings) -> TransformerConfig:
    require(settings, "layer_types", None)
    return read_decoder(settings, {"windows": _window(settings)})


def _write_mistral(config: TransformerConfig) -> dict[str, Any]:
    return write_decoder(config) | {"sliding_window": config.window(0) or None}


def _read_qwen2(settings: Settings) -> TransformerConfig:
    return read_decoder(settings, {"qkv_bias": True, "windows": _qwen_windows(settings)})


def _write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    return write_decoder(config) | _write_windows(config) | {"use_sliding_window": any(config.windows)}


def _read_qwen3(settings: Settings) -> TransformerConfig:
    own = {"qk_norm": True, "windows": _qwen_windows(settings)}
    return read_decoder(settings, own | _attention_bias(settings), head_size=128)


def _write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    return _write_qwen2(config) | {"attention_bias": config.qkv_bias}


GEMMA: dict[str, Any] = {"activation": "gelu_pytorch_tanh", "head_size": 256, "tied": True}


def _gemma(settings: Settings, logit_cap: float, attention_cap: float, period: int) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common; the numbers stand where config.json has none, null is 0."""
    require(settings, "use_bidirectional_attention", False, None)
    layers = size(settings, "num_hidden_layers")
    types = ["full_attention" if layer % period == 0 else "sliding_attention" for layer in range(1, layers + 1)]
    positive(settings, "query_pre_attn_scalar", 256)
    divisor = settings.get("query_pre_attn_scalar", 256)  # a whole number is written as one
    own: dict[str, Any] = {
        "norm": "rms_plus_one",
        "mlp": "geglu",
        "post_norms": True,
        "scaled_embedding": True,
        "attention_size": 0 if divisor == size(settings, "head_dim", 256) else divisor,
        "windows": _layer_windows(settings, types),
        "logit_cap": positive(settings, "final_logit_softcapping", logit_cap, null=0.0),
        "attention_cap": positive(settings, "attn_logit_softcapping", attention_cap, null=0.0),
    }
    return own | _attention_bias(settings)


def _write_gemma(config: TransformerConfig) -> dict[str, Any]:
    return (
        write_decoder(config, "gelu_pytorch_tanh")
        | _write_windows(config)
        | {
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": config.qkv_bias,
            "query_pre_attn_scalar": config.attention_size or config.head_size,
            "final_logit_softcapping": config.logit_cap or None,
            "attn_logit_softcapping": config.attention_cap or None,
        }
    )


def _read_gemma2(settings: Settings) -> TransformerConfig:
    return read_decoder(settings, _gemma(settings, 30.0, 50.0, period=2), **GEMMA)


def _read_gemma3(settings: Settings) -> TransformerConfig:
    own = _gemma(settings, 0.0, 0.0, period=size(settings, "sliding_window_pattern", 6)) | {"qk_norm": True}
    return read_decoder(settings, own, **GEMMA)


def _attention_bias(settings: Settings) -> dict[str, bool]:
    return dict.fromkeys(("qkv_bias", "out_bias"), truth(settings, "attention_bias", False))


def _window(settings: Settings) -> tuple[int, ...]:
    """The length of windows, () where config.json has null for it."""
    if "sliding_window" in settings and settings["sliding_window"] is None:
        return ()
    return (size(settings, "sliding_window", 4096),)


def _qwen_windows(settings: Settings) -> tuple[int, ...]:
    if not truth(settings, "use_sliding_window", False):
        return ()
    layers, full = size(settings, "num_hidden_layers"), size(settings, "max_window_layers", 28, least=0)
    types = ["full_attention" if layer < full else "sliding_attention" for layer in range(layers)]
    return _layer_windows(settings, types)


def _layer_windows(settings: Settings, types: Sequence[str]) -> tuple[int, ...]:
    """The window of each layer as the shortest tuple that repeats, from layer_types or else from `types`."""
    window = _window(settings)
    types = types if settings.get("layer_types") is None else settings["layer_types"]
    layers = size(settings, "num_hidden_layers")
    if not isinstance(types, Sequence) or len(types) != layers:
        raise wrong("layer_types", types, f"a list with one entry for each of {layers} layers")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise InputError(f"Layers of type {reprlib.repr(kind)} are not supported; full and sliding attention are.")
    windows = tuple(window[0] if window and kind == "sliding_attention" else 0 for kind in types)
    if not any(windows):
        return ()
    return next(windows[:n] for n in range(1, layers + 1) if all(w == windows[i % n] for i, w in enumerate(windows)))


def _write_windows(config: TransformerConfig) -> dict[str, Any]:
    windows = [config.window(layer) for layer in range(config.layers)]
    types = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"layer_types": types, "sliding_window": max(windows, default=0) or None}


FAMILIES: dict[str, Family] = {
    "gpt2": Family(_read_gpt2, _write_gpt2, "GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "llama": Family(_read_llama, _write_llama, "LlamaForCausalLM", "LlamaForSequenceClassification"),
    "mistral": Family(_read_mistral, _write_mistral, "MistralForCausalLM", "MistralForSequenceClassification"),
    "qwen2": Family(_read_qwen2, _write_qwen2, "Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    "qwen3": Family(_read_qwen3, _write_qwen3, "Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    "gemma2": Family(_read_gemma2, _write_gemma, "Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
    "gemma3_text": Family(_read_gemma3, _write_gemma, "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
}
