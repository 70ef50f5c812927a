"""A tiny policy, and embeddings of letters, for the recipes that write: neither needs a package."""

from collections.abc import Sequence

import jax
import numpy as np

from experiments.compare import Comparing
from experiments.options import EstimatorOptions
from experiments.reinforcing import Reinforcing
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.models.config import TransformerConfig
from rl_jax.models.huggingface import Policy
from rl_jax.models.lora import LoRA
from rl_jax.models.transformer import init_params

WORDS = ["cat", "dog", "sea", "tree", "king", "house", "river", "stone"]
SMALL = Reinforcing(
    prompts=8,
    group_size=2,
    prompt_length=60,
    completion_length=6,
    steps=3,
    learning_rate=3e-2,
    lora=LoRA(rank=2),
    options=EstimatorOptions(kl_coefficient=0.0),
    checkpoint_every=2,
    compare=Comparing(prompts=8, completions=2),
)


def tiny_policy(texts: Sequence[str]) -> Policy:
    """A random policy of one block, with a vocabulary of 280 tokens."""
    config = TransformerConfig(
        vocab_size=280, context=80, layers=1, width=16, heads=2, kv_heads=2, head_size=8, mlp_width=32
    )
    return Policy(init_params(jax.random.key(0), config), config, train_tokenizer(texts, 280))


def embed_letters(texts: Sequence[str]) -> np.ndarray:
    """Unit vectors of how often each of 26 letters occurs, and that there is a text. float32 [B, 27]."""
    counts = np.array([[1, *(text.lower().count(chr(97 + letter)) for letter in range(26))] for text in texts], float)
    return np.asarray(counts / np.linalg.norm(counts, axis=1, keepdims=True), np.float32)
