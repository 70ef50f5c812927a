"""The settings of the recipe `overoptimization`, and what it varies."""

import dataclasses
from pathlib import Path

from experiments.pretrain import check_counts
from experiments.recipes.overoptimization_curves import Line
from experiments.recipes.overoptimization_models import Learning, model_config
from experiments.recipes.overoptimization_rl import Tuning
from rl_jax.errors import InputError
from rl_jax.keys import check_seed
from rl_jax.models.config import TransformerConfig

GROUP_SIZE = 32  # completions that are sampled together, where many of a prompt are wanted


@dataclasses.dataclass(frozen=True)
class Config:
    """Gold and proxy reward of policies that are optimised against learned rewards of several sizes and data."""

    corpus: str = "bbe"
    """What the policy and the proxies are pretrained on, and whose language gold likes; see pretrain.py."""
    vocab_size: int = 512
    """Tokens of the vocabulary."""
    prompt_length: int = 8
    """Tokens of a prompt."""
    completion_length: int = 16
    """Tokens of a completion; all have as many."""
    pretraining: Learning = Learning(1000, 32, 3e-3)
    """Pretraining of the policy, and of each proxy of another width before it learns a reward."""
    layers: int = 2
    """Blocks of the policy and of the proxies."""
    policy_width: int = 64
    """Width of the policy."""
    noise: float = 0.5
    """Lead in gold reward, in standard deviations, by which the judge of pairs prefers one with odds of e to 1."""
    widths: tuple[int, ...] = (8, 16, 32, 64)
    """Widths of the proxies."""
    pairs: tuple[int, ...] = (1000, 4000, 16_000)
    """Numbers of judged pairs that they learn from."""
    width: int = 32
    """Width of those that differ in something else than width."""
    default_pairs: int = 4000
    """Pairs of those that differ in something else than data."""
    learning: Learning = Learning(500, 32, 3e-3)
    """How they learn."""
    held_out_pairs: int = 2000
    """Pairs that their accuracy is measured on."""
    members: int = 3
    """Proxies in an ensemble, each from its own bootstrap sample of the same pairs."""
    spread_weight: float = 1.0
    """Multiple of their standard deviation that is taken off their mean."""
    prompts: int = 64
    """Prompts to evaluate on, which RL never sees."""
    samples: int = 256
    """Completions of each that the best of n is chosen from; the largest n."""
    kl_coefficients: tuple[float, ...] = (0.05, 0.2)
    """Prices of a nat, in standard deviations of the proxy, besides 0."""
    tuning: Tuning = Tuning(20, 8, 16, 2e-4)
    """RL: points of a curve, updates between them, prompts in an update (four completions each), Adam's rate."""
    fitted_share: float = 0.6
    """Share of the range of d that Gao's forms are fitted on before they are held against the rest."""
    seeds: int = 4
    """Repetitions, each with judgements, proxies and RL of its own."""
    seed: int = 0
    """Seed of everything random."""
    results: Path = Path("results/overoptimization")
    """Folder that the table and the figures are written to."""


def sweeps(config: Config) -> dict[str, list[Line]]:
    """What is varied, and the proxies that differ in it. The proxy of the defaults is in each."""
    usual = Line(config.width, config.default_pairs)
    widths = [Line(width, config.default_pairs) for width in config.widths]
    amounts = [Line(config.width, pairs) for pairs in config.pairs]
    prices = [usual._replace(kl_coefficient=price) for price in (0.0, *config.kl_coefficients)]
    ensembles = [usual._replace(combination=name) for name in ("single", "mean", "minimum", "mean less spread")]
    return {"size": widths, "data": amounts, "KL coefficient": prices, "ensemble": ensembles}


def shape_of(config: Config, width: int) -> TransformerConfig:
    """A model with room for a prompt and its completion."""
    return model_config(config.vocab_size, config.prompt_length + config.completion_length, config.layers, width)


def check(config: Config) -> None:
    """Raise InputError for settings that cannot work, before the long work."""
    check_seed(config.seed)
    check_counts({"widths": min(config.widths, default=0), "pairs": min(config.pairs, default=0)})
    check_counts({f"tuning.{name}": getattr(config.tuning, name) for name in ("points", "updates", "batch_size")})
    for name in ("layers", "held_out_pairs", "prompts"):
        check_counts({name: getattr(config, name)})
    if config.seeds < 2 or config.members < 2:
        raise InputError(f"seeds is {config.seeds} and members {config.members}; give at least 2 of each.")
    if config.width not in config.widths or config.default_pairs not in config.pairs:
        raise InputError("width must be one of widths, and default_pairs one of pairs.")
    if config.samples < 1 or config.samples % GROUP_SIZE:
        raise InputError(f"samples is {config.samples}; it must be a multiple of {GROUP_SIZE}.")
    if not all(price > 0 for price in config.kl_coefficients) or config.noise < 0:
        raise InputError("kl_coefficients must be above 0, which is tried anyway, and noise at least 0.")
    if not 0 < config.fitted_share < 1:
        raise InputError(f"fitted_share is {config.fitted_share}; it must be between 0 and 1.")
