"""The rotary frequencies of a config.json: rope_parameters, and the older settings in their place."""

import math
from collections.abc import Mapping
from typing import Any

from rl_jax.errors import InputError
from rl_jax.models.config import TransformerConfig
from rl_jax.models.rotary import RopeScaling
from rl_jax.models.settings import Settings, positive, require, size, truth, wrong

GEMMA3 = "gemma3_text"  # the only family with other frequencies in layers with a window


def read_rope(settings: Settings, context: int) -> dict[str, Any]:
    """The rotary settings of a configuration: `rope_theta`, `rope_scaling`, `window_theta`.

    Raises:
        InputError: a kind of scaling that is not supported, or numbers that are missing or out of range.
    """
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise wrong("rope_parameters", rope, "an object")
    if settings.get("model_type") != GEMMA3:
        if "full_attention" in rope:
            raise InputError("Frequencies of their own for each type of layer are supported for gemma3_text alone.")
        theta = positive(rope if "rope_theta" in rope else settings, "rope_theta", 10_000.0)
        return {"rope_theta": theta, "rope_scaling": _scaling(rope, settings, context)}
    full, sliding = rope, {}
    if "full_attention" in rope or "sliding_attention" in rope:
        full, sliding = (rope.get(f"{kind}_attention") or {} for kind in ("full", "sliding"))
    if not isinstance(full, Mapping) or not isinstance(sliding, Mapping):
        raise wrong("rope_parameters", rope, "an object of objects")
    require(sliding, "rope_type", "default")
    theta = positive(full if "rope_theta" in full else settings, "rope_theta", 1_000_000.0)
    local = positive(sliding, "rope_theta", positive(settings, "rope_local_base_freq", 10_000.0))
    return {"rope_theta": theta, "rope_scaling": _scaling(full, settings, context), "window_theta": local}


def write_rope(config: TransformerConfig) -> dict[str, Any]:
    """The rope_parameters of a configuration."""
    full = {"rope_theta": config.rope_theta} | _write_scaling(config.rope_scaling)
    if not config.window_theta:
        return full
    return {
        "full_attention": full,
        "sliding_attention": {"rope_type": "default", "rope_theta": config.window_theta},
    }


def _scaling(rope: Settings, settings: Settings, context: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    require(rope, "partial_rotary_factor", 1.0, None)
    require(settings, "partial_rotary_factor", 1.0, None)
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise InputError(
            f"Models with rope_type = {kind!r} are not supported; only default, linear, dynamic, llama3 and yarn are."
        )
    factor = positive(rope, "factor")
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, factor)
    name = "original_max_position_embeddings"
    original = size(settings, name, size(rope, name, context))
    if kind == "llama3":
        low, high = positive(rope, "low_freq_factor"), positive(rope, "high_freq_factor")
        if not low < high:
            raise wrong("high_freq_factor", high, f"more than low_freq_factor, {low}")
        return RopeScaling(kind, factor, original, low, high)
    low, high = (positive(rope, name, default) for name, default in (("beta_slow", 1.0), ("beta_fast", 32.0)))
    stretch, truncate = _attention_factor(rope, factor), truth(rope, "truncate", True)
    return RopeScaling(kind, factor, original, low, high, stretch, truncate)


def _attention_factor(rope: Settings, factor: float) -> float:
    """What yarn multiplies sines and cosines by (Peng 2023, eq. 22), as config.json gives it or its parts."""
    if rope.get("attention_factor") is not None:
        return positive(rope, "attention_factor")

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return growth(positive(rope, "mscale")) / growth(positive(rope, "mscale_all_dim"))
    return growth(1.0)


def _write_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    written: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        written |= {"low_freq_factor": scaling.low, "high_freq_factor": scaling.high}
    if scaling.kind == "yarn":
        written |= {"beta_slow": scaling.low, "beta_fast": scaling.high, "truncate": scaling.truncate}
        written |= {"attention_factor": scaling.attention_factor}
    if scaling.original_context:
        written |= {"original_max_position_embeddings": scaling.original_context}
    return written
