"""The work that every contender is given: shapes of models, prompts, completions. NumPy alone: peers import it too."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """A GPT-2 (learned positions, LayerNorm, GELU, tied embeddings, MLP of 4 times the width), or a Llama of its size.

    Attributes:
        layers: blocks.
        width: D.
        heads: of 64 each.
        vocab_size: V.
        context: most tokens of a sequence.
    """

    layers: int
    width: int
    heads: int
    vocab_size: int
    context: int = 1024


@dataclasses.dataclass(frozen=True)
class Work:
    """What one RL step, or its rollout, does.

    Attributes:
        prompts: N.
        group_size: G, completions of each prompt.
        prompt_length: P, tokens of every prompt.
        length: C, the most tokens of a completion.
        mean_length: of completions that an end-of-sequence token ends, geometrically; None where all have C tokens.
        kl_coefficient: of the KL penalty.
        learning_rate: of AdamW.
    """

    prompts: int
    group_size: int
    prompt_length: int
    length: int
    mean_length: int | None = None
    kl_coefficient: float = 0.05
    learning_rate: float = 1e-6


SHAPES = {
    "A": Shape(layers=4, width=256, heads=4, vocab_size=4096),
    "B": Shape(layers=6, width=384, heads=6, vocab_size=4096),
    "G": Shape(layers=12, width=768, heads=12, vocab_size=50257),
}
FIXED = Work(prompts=16, group_size=4, prompt_length=16, length=64)
FIXED_G = Work(prompts=8, group_size=1, prompt_length=16, length=64)
SPREAD = dataclasses.replace(FIXED, length=512, mean_length=64)
EOS = 0
PRETRAIN_BATCH, PRETRAIN_LENGTH = 32, 128


def random_prompts(shape: Shape, work: Work, seed: int) -> np.ndarray:
    """Token ids without EOS, no padding. int32 [N, P]."""
    return np.random.default_rng(seed).integers(1, shape.vocab_size, (work.prompts, work.prompt_length), np.int32)


def random_windows(shape: Shape, seed: int) -> np.ndarray:
    """Token ids to pretrain on. int32 [B, L + 1]."""
    return np.random.default_rng(seed).integers(1, shape.vocab_size, (PRETRAIN_BATCH, PRETRAIN_LENGTH + 1), np.int32)
