"""What a Transformer is made of: one decoder, which is GPT-2, Llama, Mistral, Qwen or Gemma by configuration."""

import dataclasses
from typing import Any, Literal

from rl_jax.errors import InputError
from rl_jax.models.rotary import RopeScaling

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and family of a model; `gpt2` and `llama` fill it for the two families that are trained from scratch.

    Letters: D width, H heads, J key-value heads, K head size, V vocabulary.

    Attributes:
        vocab_size: V, rows of the embedding.
        context: the longest sequence, in tokens.
        layers: number of blocks.
        width: D.
        heads: H, query heads.
        kv_heads: J, key-value heads; H is a multiple of it.
        head_size: K.
        mlp_width: inner width of the MLP.
        positions: learned embeddings, or rotary (RoPE, Su 2021).
        norm: LayerNorm; RMSNorm; or RMSNorm that multiplies by 1 + its scale, as Gemma's.
        mlp: GELU (tanh form), SwiGLU, or GeGLU.
        qkv_bias: whether the query, key and value projections have biases.
        out_bias: whether the output projection of attention has one.
        mlp_bias: whether the MLP's projections have them.
        qk_norm: RMSNorm over the head size of queries and keys before rotation.
        post_norms: whether what attention and MLP give is normalised too, before it is added.
        tied: whether the output projection is the embedding.
        scaled_embedding: whether embeddings are multiplied by the root of D.
        windows: tokens that the layers look back on, themselves included; 0 is all of them. Where there are fewer
            numbers than layers they repeat; none stands for 0.
        attention_size: queries' products with keys are divided by its root; 0 stands for K.
        attention_cap: c of c tanh(x / c), which these products go through; 0 for none.
        logit_cap: the same of the logits.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how these are stretched, in layers without a window where `window_theta` is given.
        window_theta: base of the frequencies in layers with a window, which are not stretched; 0 for no difference.
        norm_epsilon: added to the variance.
        dtype: what activations are computed in; softmax, norms and logits are float32.
        remat: recompute each block in the backward pass instead of keeping its activations.
    """

    vocab_size: int
    context: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    positions: Literal["learned", "rotary"] = "rotary"
    norm: Literal["layer", "rms", "rms_plus_one"] = "rms"
    mlp: Literal["gelu", "swiglu", "geglu"] = "swiglu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    tied: bool = True
    scaled_embedding: bool = False
    windows: tuple[int, ...] = ()
    attention_size: int | float = 0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    window_theta: float = 0.0
    norm_epsilon: float = 1e-5
    dtype: Dtype = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise InputError(f"A model's {field.name} must be at least 1, not {getattr(self, field.name)}.")
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads evenly.")
        if self.positions == "rotary" and self.head_size % 2:
            raise InputError(f"Rotary positions need an even head size, not {self.head_size}.")

    def window(self, layer: int) -> int:
        """Tokens that a layer looks back on; 0 for all."""
        return self.windows[layer % len(self.windows)] if self.windows else 0


def gpt2(vocab_size: int, context: int, layers: int, width: int, heads: int, **changes: Any) -> TransformerConfig:
    """GPT-2 (Radford 2019): learned positions, LayerNorm, GELU, biases, tied embeddings."""
    own: dict[str, Any] = {"positions": "learned", "norm": "layer", "mlp": "gelu", "mlp_width": 4 * width}
    own |= dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)
    return llama(vocab_size, context, layers, width, heads, **own | changes)


def llama(vocab_size: int, context: int, layers: int, width: int, heads: int, **changes: Any) -> TransformerConfig:
    """Llama (Touvron 2023): RoPE, RMSNorm, SwiGLU of 8/3 the width, no biases, grouped-query attention on request."""
    own: dict[str, Any] = {"kv_heads": heads, "mlp_width": -(-8 * width // 3 // 32) * 32} | changes
    if "head_size" not in own:
        if heads < 1 or width % heads:
            raise InputError(f"A width of {width} does not divide into {heads} heads.")
        own["head_size"] = width // heads
    return TransformerConfig(vocab_size, context, layers, width, heads, **own)
