"""Parameters, and the named tensors that `transformers` has in their place."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rl_jax.errors import InputError
from rl_jax.models.config import TransformerConfig
from rl_jax.models.families import family
from rl_jax.models.transformer import parameter_shapes
from rl_jax.types import Array, PyTree

# Our path in a block -> the name in a layer there. Kernels are [in, out] here and in GPT-2, [out, in] in Llama.
GPT2_LAYER = {
    "attention_norm": "ln_1",
    "attention/out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}
FUSED, PARTS = "attn.c_attn", ("query", "key", "value")  # GPT-2's one matrix of three
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
GEMMA_LAYER = LLAMA_LAYER | {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
LLAMA_REST = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head"}


def _name(module: str, kind: str) -> str | None:
    """The name in a family of a module here; None for GPT-2's fused projection, and for what a Transformer has not."""
    layer_names = {"gpt2": GPT2_LAYER, "gemma2": GEMMA_LAYER, "gemma3_text": GEMMA_LAYER}.get(kind, LLAMA_LAYER)
    rest, prefix = (GPT2_REST, "h") if kind == "gpt2" else (LLAMA_REST, "model.layers")
    block, _, part = module.partition("/")
    if not part:
        return rest.get(module)
    return f"{prefix}.{block.removeprefix('block_')}.{layer_names[part]}" if part in layer_names else None


def to_tensors(params: PyTree, config: TransformerConfig) -> dict[str, np.ndarray]:
    """Parameters as named tensors of `transformers`, float32."""
    flat = {path: np.asarray(x, np.float32) for path, x in flatten_dict(params, sep="/").items()}
    kind = family(config)
    is_gpt2 = kind == "gpt2"
    tensors = {}
    for path, value in flat.items():
        module, leaf = path.rsplit("/", 1)
        if name := _name(module, kind):
            value = value.T if leaf == "kernel" and not is_gpt2 else value
            tensors[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"] = np.ascontiguousarray(value)
    if is_gpt2:
        for layer in range(config.layers):
            for leaf, name in (("kernel", "weight"), ("bias", "bias")):
                fused = [flat[f"block_{layer}/attention/{part}/{leaf}"] for part in PARTS]
                tensors[f"h.{layer}.{FUSED}.{name}"] = np.concatenate(fused, axis=-1)
    return tensors


def from_tensors(
    tensors: Mapping[str, np.ndarray],
    config: TransformerConfig,
    place: Callable[[str, np.ndarray], Array] = lambda path, value: jnp.array(value),
) -> PyTree:
    """Named tensors of `transformers` as parameters.

    Args:
        tensors: by name; each is asked for as its parameter is made.
        config: the model's configuration.
        place: makes the parameter of a path, such as "block_0/mlp/up/kernel", from its value in float32.

    Raises:
        InputError: a tensor is missing, has another shape than the configuration says, or holds other than finite
            floating-point numbers.
    """
    kind = family(config)
    is_gpt2 = kind == "gpt2"
    flat = {}
    for names, wanted in parameter_shapes(config):
        path = "/".join(names)
        module, leaf = path.rsplit("/", 1)
        suffix = "bias" if leaf == "bias" else "weight"
        block, _, part = module.partition("/attention/")
        fused = is_gpt2 and part in PARTS
        name = f"h.{block.removeprefix('block_')}.{FUSED}" if fused else _name(module, kind)
        name = f"{name}.{suffix}"
        stored = name if name in tensors else f"transformer.{name}"
        if stored not in tensors:
            raise InputError(
                f"The model's weights lack the tensor {name}, which its config.json asks for; copy or train it again."
            )
        shape = (*wanted[:-1], 3 * wanted[-1]) if fused else wanted
        shape = shape[::-1] if leaf == "kernel" and not is_gpt2 else shape
        value = read_tensor(name, tensors[stored], shape)
        if fused:
            value = np.split(value, 3, axis=-1)[PARTS.index(part)]
        value = value.T if leaf == "kernel" and not is_gpt2 else value
        flat[path] = place(path, value)
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
