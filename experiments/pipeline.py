"""The main job: pretrain a language model, give it a reward, improve it with REINFORCE, compare before and after.

    python experiments/pipeline.py
    python experiments/pipeline.py --corpus my_texts/ --reward keyword --reward.keywords king gold
    python experiments/pipeline.py --reward learned --gold sentiment

With `--reward learned` the reward is a model of preferences: those of a file, or those of a gold reward between pairs
of the policy's own completions. `pretrain.py`, `finetune.py`, `train_reward.py` and `reinforce.py` are its parts, each
a script of its own.
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from experiments.compare import compare
from experiments.finetune import Demonstrations, Finetuning, finetune, load_demonstrations
from experiments.finetune import check as check_finetuning
from experiments.judgements import Judgements
from experiments.options import describe_estimator
from experiments.pretrain import Pretraining, load_given, load_text, model_config, pretrain, saved_tokenizer
from experiments.pretrain import check as check_pretraining
from experiments.reinforce import reinforce
from experiments.reinforcing import (
    Reinforcing,
    check_text_reward,
    choose_prompts,
    fit_width,
    make_gold,
    make_sampling,
)
from experiments.reinforcing import check as check_reinforcing
from experiments.rounds import Preferring, make_learn, prepare
from experiments.train_reward import Learning
from rl_jax.data.tokenizer import save_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.config import TransformerConfig
from rl_jax.models.huggingface import save_policy
from rl_jax.models.lora import check_lora
from rl_jax.models.reward_model import RewardModel
from rl_jax.rewards.compose import Reward, RewardConfig, make_reward
from rl_jax.run.folder import check_run, open_run, write_json
from rl_jax.run.loop import run_main
from rl_jax.run.machine import Machine
from rl_jax.run.metrics import open_metrics
from rl_jax.run.results import report_if_stopped, timed, write_results
from rl_jax.run.tracking import Tracker


@dataclasses.dataclass(frozen=True)
class Config:
    """Pretrain a language model, give it a reward, improve it with REINFORCE, compare before and after."""

    run: Path = Path("runs/pipeline")
    """Folder that the run writes to."""
    resume: bool = False
    """Continue the run in that folder from its last checkpoint."""
    track: Tracker | None = None
    """Send the metrics to Weights & Biases or to trackio as well."""
    corpus: str = "bbe"
    """bbe (Bible in Basic English), sotu or chitchat; a .txt, .jsonl or .parquet file, or a folder of them; or a data
    set of the hub (org/name:split)."""
    seed: int = 0
    """Seed of everything random but the held-out passages, which are the same for all seeds."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()
    pretrain: Pretraining = Pretraining()
    demonstrations: Path | None = None
    """Prompts with completions to fine-tune on after pretraining, as for finetune.py; none skips it."""
    finetune: Finetuning = Finetuning()
    reward: RewardConfig = RewardConfig()
    gold: RewardConfig = RewardConfig(names=())
    preferences: Preferring = Preferring()
    learn: Learning = Learning()
    reinforce: Reinforcing = Reinforcing()


def main(config: Config) -> None:
    seconds: dict[str, float] = {}
    start, seed = time.perf_counter(), config.seed
    model = model_config(config.pretrain)
    check_run(config.run, config, config.resume)
    base, saved = load_given(config.pretrain), saved_tokenizer(config.run, config.resume)
    model = base.config if base else model
    text = load_text(config.corpus, config.pretrain.vocab_size, saved, base and base.tokenizer)
    reward, gold, given = make_rewards(config, text.tokenizer, model)
    prompts = choose_prompts(config.reinforce, text.tokenizer, lambda: text.held_out)
    rl = fit_width(config.reinforce, prompts)
    reward, gold = reward._replace(rows=prompts.rows), gold and gold._replace(rows=prompts.rows)
    demonstrations = load_if_given(config, text.tokenizer, model)
    check_pretraining(config.pretrain, text, seed)
    check_reinforcing(rl, model, reward, prompts, text.tokenizer, seed)
    check_text_reward(gold, prompts, text.tokenizer)

    estimator = describe_estimator(rl.estimator, rl.options, rl.group_size)
    sampling = make_sampling(rl, base.ends if base else (text.tokenizer.eos_token_id,))
    run = open_run(config.run, "experiments/pipeline.py", config, estimator=estimator)
    save_tokenizer(run / "policy", text.tokenizer)
    writer = open_metrics(run, config.track)
    with timed(seconds, "pretrain"), report_if_stopped(run):
        policy, summary = pretrain(config.pretrain, text, seed, run, writer, base)
    policy = policy._replace(place=save_policy(run / "pretrained", policy))
    write_json(run / "summary.json", summary)  # for the report of a run that stops after this
    if demonstrations is not None:
        with timed(seconds, "finetune"), report_if_stopped(run):
            policy, measured = finetune(config.finetune, policy, demonstrations, seed, run, writer)
        policy = policy._replace(place=save_policy(run / "finetuned", policy))
        summary |= {"finetune": measured}
    learn, rounds = None, config.preferences.rounds
    if is_learned_here(config):
        learn = make_learn(config.preferences, config.learn, given, policy, gold, prompts, sampling, seed, run, writer)
        with timed(seconds, "reward"), report_if_stopped(run):
            first = learn(policy.params, 1)
        reward = reward._replace(params=first.model.params)
        write_json(run / "summary.json", summary | {"reward_model": first.summary})
    with timed(seconds, "rl"), report_if_stopped(run):
        params_of_round = learn and (lambda params, number: learn(params, number).model.params)
        tuned = reinforce(rl, policy, reward, prompts, seed, run, writer, gold, params_of_round, rounds)
    save_policy(run / "policy", tuned)
    if learn is not None:
        with report_if_stopped(run):
            last = learn(tuned.params, rounds)  # at hand, but for a run that goes on after all of RL
        reward, summary = reward._replace(params=last.model.params), summary | {"reward_model": last.summary}
    writer.close()
    with timed(seconds, "compare"):
        compared, pairs = compare(
            rl.compare, policy, tuned, reward, prompts.held_out, sampling, seed, gold, writer.keep
        )
    spent = {"seconds": time.perf_counter() - start, "seconds_by_stage": seconds}
    write_results(run, summary | compared | spent | {"seed": seed}, pairs)


def load_if_given(config: Config, tokenizer: Any, model: TransformerConfig) -> Demonstrations | None:
    """The demonstrations to fine-tune on, checked, or None where there are none."""
    if config.demonstrations is None:
        if config.finetune != Finetuning():
            raise InputError("finetune has no effect without demonstrations: give a file of them, or leave it out.")
        return None
    check_lora(config.finetune.lora, model)
    rows = load_demonstrations(config.demonstrations, tokenizer, model.context)
    check_finetuning(config.finetune, rows, config.seed)
    return rows


def is_learned_here(config: Config) -> bool:
    """Whether the reward is learned within this run."""
    return "learned" in config.reward.names and config.reward.model is None


def make_rewards(
    config: Config, tokenizer: Any, model: TransformerConfig
) -> tuple[Reward, Reward | None, Judgements | None]:
    """The reward that is optimised, without params yet if it is learned here; the gold one; judgements from a file."""
    gold = make_gold(config.gold, tokenizer)
    if not is_learned_here(config):
        for name, default in (("preferences", Preferring()), ("learn", Learning())):
            if getattr(config, name) != default:
                raise InputError(f"{name} has no effect: the reward is not learned here; ask for --reward learned.")
        return make_reward(config.reward, tokenizer), gold, None
    if gold is None and config.preferences.file is None:
        gold = make_reward(RewardConfig(), tokenizer)
    given = prepare(config.preferences, config.learn, model, tokenizer, gold, config.reinforce.steps, config.seed)
    shape = dataclasses.replace(model, layers=config.learn.layers or model.layers, tied=True)
    # Its params come later; that there will be so many members is known now.
    blank = RewardModel({"members": np.zeros(config.learn.members)}, shape, tokenizer)
    return make_reward(config.reward, tokenizer, blank)._replace(params=()), gold, given


if __name__ == "__main__":
    run_main(main, Config)
