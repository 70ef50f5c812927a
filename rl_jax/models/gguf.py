"""Models in a GGUF file, as llama.cpp writes them: settings, tensors and tokenizer as `transformers` has them.

Weights are stored in blocks of few bits and read as float32, so that a model can be learned from here.
"""

import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rl_jax.errors import InputError
from rl_jax.models.shards import Stored

SETTINGS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
REST = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FREQUENCIES = "rope_freqs.weight"
FAMILIES = ("llama", "qwen2", "qwen3")
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"llama-bpe": WORDS % "{1,3}", "llama3": WORDS % "{1,3}", "qwen2": WORDS % ""}
DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r")
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens


def read_gguf(path: Path) -> tuple[dict[str, Any], Stored, Mapping[str, Any]]:
    """Open a GGUF file.

    Returns:
        Settings as of a config.json; tensors by the names that `transformers` has, float32, each read when it is asked
        for; and what the file says of itself, by key.

    Raises:
        InputError: gguf is not installed, or the model is of a kind that is not supported.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError("GGUF files are read by the package gguf, which is missing: pip install gguf")
    import gguf  # optional

    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in stored.items()}

    def read(name: str) -> np.ndarray:
        values = gguf.dequantize(stored[name].data, stored[name].tensor_type).reshape(shapes[name])
        return values.astype(np.float32, copy=False)

    factors = read(FREQUENCIES) if FREQUENCIES in stored else None
    settings = _settings(metadata, shapes, factors)
    kind = settings["model_type"]
    heads = {"attn_q": settings["num_attention_heads"], "attn_k": settings["num_key_value_heads"]}

    def read_in_order(name: str) -> np.ndarray:
        part = name.split(".")[-2]
        return _halves_apart(read(name), heads[part]) if kind == "llama" and part in heads else read(name)

    readers = {_name(name, kind): functools.partial(read_in_order, name) for name in stored if name != FREQUENCIES}
    return settings, Stored(readers), metadata


def _settings(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: np.ndarray | None
) -> dict[str, Any]:
    """Metadata as the dict of a config.json; the shapes of the tensors say what it leaves out."""
    kind = metadata.get("general.architecture")
    if kind not in FAMILIES:
        raise InputError(f"GGUF models of architecture {kind!r} are not supported; {', '.join(FAMILIES)} are.")
    found = {name: metadata.get(f"{kind}.{key}") for key, name in SETTINGS.items()}
    # Numbers are stored in float32: 1e-5 as 9.999999747e-06.
    settings = {name: float(f"{x:.7g}") if isinstance(x, float) else x for name, x in found.items() if x is not None}
    missing = {"num_attention_heads", "hidden_size", "max_position_embeddings"} - set(settings)
    if missing or "token_embd.weight" not in shapes:
        raise InputError(f"The model lacks {', '.join(sorted(missing)) or 'its embedding'}: copy it again.")
    settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
    settings.setdefault("head_dim", settings["hidden_size"] // settings["num_attention_heads"])
    theta = settings.pop("rope_theta", 10_000.0)
    rope = {"rope_type": metadata.get(f"{kind}.rope.scaling.type", "default"), "rope_theta": theta}
    rope["rope_type"] = "default" if rope["rope_type"] == "none" else rope["rope_type"]
    if rope["rope_type"] != "default":
        rope["factor"] = metadata.get(f"{kind}.rope.scaling.factor")
    turned = metadata.get(f"{kind}.rope.dimension_count", settings["head_dim"])
    if turned != settings["head_dim"]:
        rope["partial_rotary_factor"] = turned / settings["head_dim"]
    if factors is not None:
        rope |= _llama3_rope(theta, factors)
    return settings | {
        "model_type": kind,
        "vocab_size": shapes["token_embd.weight"][0],
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": rope,
    }


def _llama3_rope(theta: float, factors: np.ndarray) -> dict[str, Any]:
    """The rotary scaling of Llama 3.1 and 3.2 that a file has only as the divisor of each frequency. [K / 2]."""
    largest = float(factors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    low, high, context = LLAMA3_ROPE.values()
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / largest + smooth), rtol=1e-3):
        raise InputError("The model scales its rotary frequencies otherwise than Llama 3 does, which is not supported.")
    return {"rope_type": "llama3", "factor": largest} | LLAMA3_ROPE


def _name(name: str, kind: str) -> str:
    """The name that `transformers` has for a tensor; InputError where the Transformer here has none such."""
    module, _, leaf = name.rpartition(".")
    layer, part = found.groups() if (found := re.fullmatch(r"blk\.(\d+)\.(\w+)", module)) else (None, module)
    known = LAYER if layer else REST
    biased = kind == "qwen2" and part in ("attn_q", "attn_k", "attn_v")
    if part not in known or not (leaf == "weight" or (leaf == "bias" and biased)):
        raise InputError(f"The model has a tensor {name}, which models of type {kind} here do not.")
    return f"model.layers.{layer}.{known[part]}.{leaf}" if layer else f"{known[part]}.{leaf}"


def _halves_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in the order of `transformers`: llama.cpp has those that are rotated together in pairs.

    The inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py. [H K, D].
    """
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """The tokenizer in a GGUF file, with the same ids.

    Raises:
        InputError: it is no byte-level BPE, or cuts text into words in a way that is not known here.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast  # slow to import

    said = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    model, cut = said.get("model"), said.get("pre", "gpt-2")
    if model != "gpt2":
        raise InputError(f"GGUF tokenizers of the kind {model!r} are not supported; only 'gpt2', byte-level BPE, is.")
    if cut not in ("gpt-2", *DIGIT_BY_DIGIT, *SPLITS):
        raise InputError(f"GGUF tokenizers that cut text as {cut!r} does are not supported.")
    tokens, types = said["tokens"], said.get("token_type") or [1] * len(said["tokens"])
    vocab = {token: id for id, (token, kind) in enumerate(zip(tokens, types, strict=True)) if kind != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in said["merges"]]
    # As in Llama 3's own tokenizer.json: a word that is a token is not built of merges.
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=cut in ("llama-bpe", "llama3")))
    if cut in SPLITS:
        split = pre_tokenizers.Split(Regex(SPLITS[cut]), "isolated")
        parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if cut in DIGIT_BY_DIGIT else []
        parts = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    backend.decoder = decoders.ByteLevel()
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()
    for token, id in vocab.items():
        if types[id] in (CONTROL, USER_DEFINED):
            added = AddedToken(token, normalized=False, special=types[id] == CONTROL)
            (backend.add_special_tokens if types[id] == CONTROL else backend.add_tokens)([added])
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: said.get(f"{key}_token_id") for name, key in named.items()}
    special = {f"{name}_token": tokens[id] for name, id in ids.items() if id is not None}
    if said.get("add_bos_token") and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
        **special,
    )
