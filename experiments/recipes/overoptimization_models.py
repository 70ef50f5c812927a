"""The models of the recipe `overoptimization`: a policy, a gold reward, its judgements, and proxies that learn these.

Letters: N prompts, G completions of each, B sequences, C completion length, S seeds, M judged rows of each, R proxies.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.complete import in_blocks, make_block_sampler
from experiments.pretrain import Text, learning_rate
from rl_jax.data.prompts import passage_openings
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import apply_gradients, init_state, make_optimizer
from rl_jax.models.config import TransformerConfig, llama
from rl_jax.models.reward_model import ensemble_rewards, init_reward_params, make_backbone
from rl_jax.models.transformer import init_params
from rl_jax.preferences.learning import JudgedLoss, ensemble_update, init_ensemble_state
from rl_jax.pretraining import pretrain_gradient
from rl_jax.rewards.tokens import repetition_penalty
from rl_jax.run.spmd import make_mesh, pmapped
from rl_jax.sampling import Sampling
from rl_jax.sweep import make_sweep
from rl_jax.types import Array, Metrics, PreferenceBatch, PyTree, Rollout, TrainState

BETAS = (0.9, 0.95)  # of AdamW
BLOCK = 1024  # sequences that are scored at once
FEATURES = 4  # of a token, that decide what a pair is worth
MOST = 2.0  # standard deviations of worth and of language that the gold reward approaches
LOOP_COST = 2.0  # gold reward that a completion of nothing but loops loses


class Learning(NamedTuple):
    """How a model is trained: AdamW, its rate decaying to a tenth along a cosine.

    Attributes:
        updates: how many.
        batch_size: windows, or judged prompts, in each.
        rate: the highest learning rate.
    """

    updates: int
    batch_size: int
    rate: float


class Prompts(NamedTuple):
    """Openings of passages that pretraining never saw. int32 [N, P], bool [N, P]."""

    tokens: Any
    mask: Any


def model_config(vocab_size: int, context: int, layers: int, width: int) -> TransformerConfig:
    """A Llama with heads of 16, or of 8 where it is no wider."""
    return llama(vocab_size, context, layers, width, max(width // 16, 1))


def block_parameters(config: TransformerConfig) -> int:
    """Parameters of a model without its embedding, as scaling laws count them."""
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    return sum(x.size for name, part in params.items() if name != "embedding" for x in jax.tree.leaves(part))


def pretrain_model(config: TransformerConfig, tokens: np.ndarray, learning: Learning, seed: int) -> PyTree:
    """A language model of the corpus, int32 [n]: its parameters. The whole training is one program."""
    optimizer = make_optimizer(learning_rate(learning.rate, learning.updates, 40), 0.1, 1.0, BETAS)

    def run(tokens: Array) -> PyTree:
        def update(state: TrainState, step: Array) -> tuple[TrainState, Array]:
            key = step_key(seed, Purpose.SHUFFLE, step)
            starts = jax.random.randint(key, (learning.batch_size, 1), 0, len(tokens) - config.context)
            windows = tokens[starts + jnp.arange(config.context + 1)[None]]
            grads, metrics = pretrain_gradient(state.params, windows, config)
            state, _ = apply_gradients(state, grads, optimizer)
            return state, metrics["loss"]

        state = init_state(init_params(step_key(seed, Purpose.INIT), config), optimizer, kl_coefficient=0.0)
        return jax.lax.scan(update, state, jnp.arange(learning.updates))[0].params

    return jax.device_get(pmapped(run, make_mesh(), (None,), None)(tokens))


def make_prompts(text: Text, length: int, evaluated: int, seed: int) -> tuple[Prompts, Prompts]:
    """The openings of held-out passages in random order: those to evaluate on, and the others."""
    prompts = Prompts(*passage_openings(text.tokenizer, text.held_out, length))
    order = np.random.default_rng(seed).permutation(len(prompts.tokens))
    return take(prompts, order[:evaluated]), take(prompts, order[evaluated:])


def sample(
    policy: PyTree, config: TransformerConfig, sampling: Sampling, key: Array, prompts: Prompts, completions: int
) -> Rollout:
    """So many completions of each prompt, those of a prompt consecutive; a multiple of the sampling's group size."""
    repeated = take(prompts, np.repeat(np.arange(len(prompts.tokens)), completions // sampling.group_size))
    sampler = make_block_sampler(config, sampling, False)

    def block(index: np.ndarray, prompts: Prompts) -> Rollout:
        return sampler(policy, policy, key, index, *prompts)[0]

    return in_blocks(block, repeated, BLOCK // sampling.group_size, "sample")


class Gold(NamedTuple):
    """The gold reward: what words and pairs of words are worth, up to a limit, less what broken language costs.

    Attributes:
        words: what each token is worth. [V].
        before: features of a token as the first of a pair. [V, F].
        after: and as the second; a pair is worth their inner product. [V, F].
        bigrams: log-probability of each token after each other in the corpus, nats. [V, V].
        mean: of worth, language and the whole, on the reference policy. [3].
        std: the same. [3].
    """

    words: Any
    before: Any
    after: Any
    bigrams: Any
    mean: Any
    std: Any


def make_gold(tokens: np.ndarray, vocab_size: int, seed: int) -> Gold:
    """A gold reward with random worths and the bigrams of a corpus, int32 [n]; not yet measured on a policy.

    Bigrams are smoothed by the frequencies of tokens, with the weight of five occurrences.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros((vocab_size, vocab_size))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    frequencies = (np.bincount(tokens, minlength=vocab_size) + 1) / (len(tokens) + vocab_size)
    smoothed = (counts + 5 * frequencies[None]) / (counts.sum(axis=1, keepdims=True) + 5)
    words, before, after = (rng.normal(size=(vocab_size, n)) for n in (1, FEATURES, FEATURES))
    arrays = (words[:, 0], before, after / FEATURES**0.5, np.log(smoothed))
    return Gold(*(array.astype(np.float32) for array in arrays), *np.array([[0.0] * 3, [1.0] * 3], np.float32))


def gold_parts(gold: Gold, rollout: Rollout) -> tuple[Array, Array, Array]:
    """The worth of a completion's words and pairs, and its language, each standardised, and its loops. [B] each.

    Language is the mean log-probability of its bigrams; loops are minus the share of bigrams that repeat.
    """
    tokens = jnp.concatenate([rollout.prompts[:, -1:], rollout.completions], axis=1)
    first, second = tokens[:, :-1], tokens[:, 1:]
    pairs = jnp.sum(gold.before[first] * gold.after[second], axis=(1, 2))
    worth = jnp.sum(gold.words[second], axis=1) + pairs
    language = jnp.mean(gold.bigrams[first, second], axis=1)
    worth, language = ((x - gold.mean[i]) / gold.std[i] for i, x in enumerate((worth, language)))
    return worth, language, repetition_penalty(rollout)


def gold_reward(gold: Gold, rollout: Rollout) -> Array:
    """The gold reward of completions that all have C tokens. [B].

    With w the standardised worth, l the standardised language and s(x) = x / sqrt(1 + x^2 / 4), which stays between -2
    and 2, it is s(w) + min(s(l), 0) + 2 loops, standardised: language counts where it is worse than usual.
    """
    worth, language, loops = gold_parts(gold, rollout)
    worth, language = (x / jnp.sqrt(1 + jnp.square(x / MOST)) for x in (worth, language))
    reward = worth + jnp.minimum(language, 0.0) + LOOP_COST * loops
    return (reward - gold.mean[2]) / gold.std[2]


def measure_gold(gold: Gold, rollout: Rollout) -> Gold:
    """The gold reward standardised on a rollout: its parts, and then the whole."""
    worth, language, _ = (np.asarray(part, np.float64) for part in gold_parts(gold, rollout))
    gold = gold._replace(
        mean=np.array([worth.mean(), language.mean(), 0.0], np.float32),
        std=np.array([worth.std(), language.std(), 1.0], np.float32),
    )
    whole = np.asarray(gold_reward(gold, rollout), np.float64)
    mean, std = np.append(gold.mean[:2], whole.mean()), np.append(gold.std[:2], whole.std())
    return gold._replace(mean=mean.astype(np.float32), std=std.astype(np.float32))


def train_rewards(
    language_model: PyTree,
    config: TransformerConfig,
    rows: dict[str, np.ndarray],
    data: PreferenceBatch,
    loss_fn: JudgedLoss,
    learning: Learning,
) -> PyTree:
    """Reward models from one language model, each with judgements of its own, as rows of one program.

    Args:
        language_model: parameters that the backbones begin with.
        config: their configuration.
        rows: of each model "seed"; "source", whose judgements it learns from; "pairs", how many of them, the first;
            "member", 0 for a model that sees each alike, otherwise the number of a bootstrap sample. int32 [R].
        data: judgements of each source. [S, M, ...].
        loss_fn: what they learn by.
        learning: how.

    Returns:
        Parameters [R, 1, ...]: each an ensemble of one.
    """
    backbone, config = make_backbone(language_model, config)
    optimizer = make_optimizer(learning_rate(learning.rate, learning.updates, 20), 0.1, 1.0, BETAS)

    def run(row: dict[str, Array], backbone: PyTree, data: PreferenceBatch) -> PyTree:
        seed, pairs = row["seed"], row["pairs"]
        drawn = jax.random.randint(step_key(seed, Purpose.PREFERENCE, row["member"]), (data.labels.shape[1],), 0, pairs)

        def update(state: TrainState, step: Array) -> tuple[TrainState, Metrics]:
            key = jax.random.fold_in(step_key(seed, Purpose.SHUFFLE, step), row["member"])
            chosen = jax.random.randint(key, (learning.batch_size,), 0, pairs)
            chosen = jnp.where(row["member"] == 0, chosen, drawn[chosen])
            batch = jax.tree.map(lambda x: x[row["source"], chosen][None], data)
            state, metrics = ensemble_update(state, batch, config, loss_fn, optimizer)
            return state, {"loss": metrics["loss"]}

        params = init_reward_params(step_key(seed, Purpose.HEAD, row["member"]), backbone, config)
        params = jax.tree.map(lambda x: x[None], params)
        return jax.lax.scan(update, init_ensemble_state(params, optimizer), jnp.arange(learning.updates))[0].params

    return jax.device_get(make_sweep(run, make_mesh())(rows, backbone, data))


def make_scorer(config: TransformerConfig) -> Callable[[PyTree, Rollout], np.ndarray]:
    """A compiled function of the parameters of reward models [R, K, ...] and a rollout -> their rewards [R, K, B]."""

    def score(params: PyTree, rollout: Rollout) -> Array:
        rewards = jax.lax.map(lambda each: ensemble_rewards(each, rollout, config), params)
        return jnp.moveaxis(rewards, 2, 0)

    mapped = pmapped(score, make_mesh(), (None, 0), 0)

    def score_all(params: PyTree, rollout: Rollout) -> np.ndarray:
        found = in_blocks(lambda _, block: mapped(params, block), rollout, BLOCK, "score")
        return np.moveaxis(found, 0, 2)

    return score_all


def take(tree: PyTree, rows: Array | np.ndarray | int) -> PyTree:
    """Rows of every array of a pytree."""
    return jax.tree.map(lambda x: x[rows], tree)
