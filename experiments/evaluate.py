"""Policies beside each other: sampled and as best of n, under any rewards and a judge, on any prompts.

    python experiments/evaluate.py --policies runs/a/pretrained runs/a/policy --best-of 1 4 16
    python experiments/evaluate.py --policies runs/a/policy --reward regex --reward.pattern king --best-of 1 4
    python experiments/evaluate.py --policies runs/a/policy runs/b/policy --prompt-file my.jsonl --judge mine:better

Writes to the run's folder the table (table.json, table.md), its figure (evaluate.png), its settings (settings.json),
completions.jsonl, and with a judge verdicts.jsonl. A judge is a function (prompt, first completion, second completion)
-> probability that the first is the better, in a module that is installed or in the current directory.

A row is a policy, or the best of n of its completions by the first of the rewards: the mean over every choice of n from
all G, and its 95 % interval over prompts. The columns: each reward; wins against the first policy, by each reward (ties
count half) and by the judge (the mean of both orders); the judge's position bias, 0 for one that does not mind which it
is shown first; pass@k where a reward is 0 or 1; the exact KL from the first policy, with every token kept, and for a
best of n what it is at most; tokens of a completion; the share cut at the most tokens; distinct-2 of all completions.
Cells that have no meaning are empty: a best of n picks too few completions for a distinct-2 that could be compared.
"""

import dataclasses
import inspect
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from experiments.complete import Sampled, alike, complete
from experiments.evaluate_figures import draw_policies
from experiments.judge import JudgeFn, make_judge
from experiments.pretrain import check_counts, held_out_passages
from experiments.reinforcing import check_as_chat, spread
from rl_jax.best_of_n import best_of_n_kl_bound, best_of_n_weights, is_binary, pass_at_k
from rl_jax.data.conversations import make_render
from rl_jax.data.prompt_rows import Asked, PromptRows, check_same, prompt_key, read_prompt_rows
from rl_jax.data.prompts import decode_completions, encode_prompts, passage_openings
from rl_jax.errors import InputError
from rl_jax.evaluation import (
    Estimate,
    Judge,
    ask_judge,
    distinct_n,
    judged_shares,
    mean_interval,
    position_bias,
    share_interval,
    win_shares,
)
from rl_jax.keys import Purpose, check_seed, step_key
from rl_jax.models.huggingface import load_policy
from rl_jax.rewards.compose import (
    SETTINGS,
    RewardConfig,
    check_text_settings,
    import_function,
    make_reward,
    try_text_reward,
)
from rl_jax.run.folder import check_run
from rl_jax.run.loop import run_main
from rl_jax.run.machine import Machine
from rl_jax.run.processes import is_first, on_first
from rl_jax.run.tables import open_results, write_table
from rl_jax.sampling import Sampling

OPENING = 16  # tokens of a prompt from a corpus


@dataclasses.dataclass(frozen=True)
class Config:
    """Policies, sampled and as best of n, under rewards and a judge."""

    policies: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=["--models"])]
    """Policies, as reinforce.py takes one. The first is the one that the others, and every best of n, are compared
    with."""
    reward: RewardConfig = RewardConfig()
    best_of: tuple[int, ...] = (1,)
    """A row for the best of each of these numbers of completions, by the first of the rewards; 1 is the policy itself.
    Where a reward is 0 or 1, they are the k of pass@k too."""
    judge: str = ""
    """A judge of pairs of completions, as module:function; it is asked of each completion and one of the first
    policy's, in both orders."""
    prompts: tuple[str, ...] = ()
    """Prompts to complete."""
    prompt_file: Path | None = None
    """Prompts of a file, as for reinforce.py: .jsonl, .parquet, .txt or a data set of the hub. Messages go through the
    chat template of each policy. A reward on text with three arguments is given the row."""
    as_chat: bool = False
    """Take each prompt that is a string for a user's message."""
    prompts_from: str = ""
    """Corpus, as for pretraining: the openings of its held-out passages are the prompts."""
    prompt_length: int | None = None
    """Most tokens of an opening, up to the end of a word, with --prompts-from; 16 where none is given."""
    most_prompts: int = 128
    """Prompts that are taken, from all over the file or the corpus. From a corpus, 128 are those that reinforce.py
    keeps for its comparison, and never learns from, with its defaults."""
    completions: int = 16
    """Completions of each prompt by each policy, G; the best of n is worked out from all of them."""
    length: int = 48
    """Most tokens of a completion."""
    temperature: float = 0.8
    """Divides the logits that completions are sampled from; 0 takes the likeliest token each time."""
    top_k: int = 0
    """Sample among this many of the likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the fewest tokens that have this probability together; 1 means all."""
    min_p: float = 0.0
    """Sample among tokens with at least this share of the highest probability; 0 means all."""
    run: Path = Path("runs/evaluate")
    """Folder that is written to."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What activations are computed in."""
    seed: int = 0
    """Seed of the completions."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()


def read_prompts(config: Config, first: Any, tokenizer: Any) -> list[Asked]:
    """The prompts for a policy, from where the configuration says.

    Args:
        config: the settings.
        first: tokenizer of the first policy, which cuts the passages of a corpus.
        tokenizer: of the policy, with its chat template.
    """
    given = [bool(config.prompts), config.prompt_file is not None, bool(config.prompts_from)]
    if sum(given) != 1:
        raise InputError("Prompts come from one place: give --prompts, --prompt-file or --prompts-from.")
    if config.prompt_length is not None and not config.prompts_from:
        raise InputError("prompt_length is of passages: give --prompts-from, or leave it out.")
    render = make_render(tokenizer)
    if config.prompt_file is not None:
        asked, broken = read_prompt_rows(config.prompt_file, render, config.as_chat)
        if broken:
            raise InputError(f"{broken[0]}.")
        check_as_chat(config.as_chat, asked, tokenizer)
    else:
        texts = config.prompts or corpus_prompts(config, first)
        chats = [render([{"role": "user", "content": text}], True) if config.as_chat else text for text in texts]
        asked = [Asked(chat, text, text, {"prompt": text}, "") for chat, text in zip(chats, texts, strict=True)]
    return [asked[number] for number in spread(min(config.most_prompts, len(asked)), len(asked))]


def corpus_prompts(config: Config, tokenizer: Any) -> list[str]:
    """The openings of a corpus's held-out passages."""
    length = OPENING if config.prompt_length is None else config.prompt_length
    return decode_completions(tokenizer, *passage_openings(tokenizer, held_out_passages(config.prompts_from), length))


def check(config: Config) -> None:
    """Raise InputError for settings that cannot work, before anything is read."""
    check_seed(config.seed)
    check_run(config.run, config, resume=False)
    if not config.policies or len(set(config.policies)) < len(config.policies):
        raise InputError("Give the folder of at least one policy with --policies, and none twice.")
    if len(set(config.reward.names)) < len(config.reward.names):
        raise InputError("A reward is named twice; each has its own columns, so once is enough.")
    if config.reward.weights:
        raise InputError("reward.weights has no effect: each reward has its own columns. Leave it out.")
    check_counts({name: getattr(config, name) for name in ("completions", "length", "most_prompts")})
    numbers = config.best_of
    if not numbers or not all(1 <= n <= config.completions for n in numbers) or len(set(numbers)) < len(numbers):
        raise InputError(
            f"best_of is {numbers}: give different numbers from 1 to completions, {config.completions}; a best of more "
            "needs more --completions."
        )
    if config.judge and len(config.policies) == 1 and numbers == (1,):
        raise InputError("The judge has nothing to compare: give a second policy, or a --best-of above 1.")
    if config.temperature == 0 and config.completions > 1:
        raise InputError("At temperature 0 all completions of a prompt are the same: give --completions 1.")


def make_rewards(config: RewardConfig, tokenizer: Any, rows: PromptRows) -> dict[str, JudgeFn]:
    """Each named reward by itself, with the rows that prompts are from.

    A setting that none of them uses is refused, as where they are summed.
    """

    def alone(name: str) -> RewardConfig:
        others: dict[str, Any] = {
            setting: getattr(RewardConfig(), setting)
            for setting, (users, _) in SETTINGS.items()
            if name not in users and set(users) & set(config.names)
        } | {setting: getattr(RewardConfig(), setting) for setting in on_text}
        return dataclasses.replace(config, names=(name,), **others)

    on_text = {setting: getattr(config, setting) for setting in ("time_limit", "on_failure")}
    rewards = {name: make_reward(alone(name), tokenizer)._replace(**on_text, rows=rows) for name in config.names}
    check_text_settings(config, any(reward.on_text is not None for reward in rewards.values()))
    for reward in rewards.values():  # a mistake in one should show now rather than after sampling
        asked = next(iter(rows.values()), None)
        prompt, row = ("a", None) if asked is None else (asked.prompt, [asked.row])
        try_text_reward(reward, [prompt], ["b"], row)
    return {name: make_judge(reward, tokenizer) for name, reward in rewards.items()}


def rows_of(asked: list[Asked], encoded: tuple[np.ndarray, np.ndarray]) -> PromptRows:
    """The rows of prompts from a file, by their tokens; InputError where two have one prompt and differ elsewhere."""
    rows: dict[bytes, Asked] = {}
    for each, ids, real in zip(asked, *encoded, strict=True):
        check_same(rows.setdefault(prompt_key(ids[real]), each), each)
    return rows


def load_judge(name: str) -> Judge:
    """The user's judge, after it was asked once."""
    judge = import_function(name, "judge")
    try:
        inspect.signature(judge).bind("prompt", "first", "second")
    except TypeError as error:
        raise InputError(f"the judge {name} must take a prompt and two completions: {error}") from error
    ask_judge(judge, ["In the"], [" beginning"], [" end"])
    return judge


def make_sampling(config: Config, ends: tuple[int, ...]) -> Sampling:
    """How the settings sample, until one of the ids that end a completion."""
    names = ("temperature", "top_k", "top_p", "min_p")
    settings = {name: getattr(config, name) for name in names}
    return Sampling(config.length, config.completions, eos=ends, **settings)


def row(
    name: str,
    sampled: Sampled,
    n: int,
    wins: dict[str, np.ndarray],
    verdicts: np.ndarray | None,
    binary: list[str],
    config: Config,
) -> dict[str, Any]:
    """A line of the table: the best of n of a policy's completions by the first of the rewards, in expectation.

    Args:
        name: of the policy.
        sampled: its completions.
        n: 1 for the policy itself.
        wins: how far each completion wins against the first policy, by reward or judge; empty for itself. [N, G].
        verdicts: the judge's. [N, G, 2].
        binary: rewards that are 0 or 1.
        config: the settings.
    """
    proxy = sampled.rewards[config.reward.names[0]]
    weights = best_of_n_weights(proxy, n)

    def expected(values: Any, interval: Callable[[np.ndarray], Estimate] = mean_interval) -> Estimate:
        return interval(np.sum(weights * np.reshape(values, weights.shape), axis=1, keepdims=True))

    line: dict[str, Any] = {"policy": name, "best of": n}
    line |= {f"reward {reward}": expected(values) for reward, values in sampled.rewards.items()}
    line |= {f"wins by {judge}": expected(shares, share_interval) for judge, shares in wins.items()}
    line["position bias"] = position_bias(verdicts) if verdicts is not None and n == 1 else None
    numbers = [k for k in config.best_of if k > 1] if n == 1 else []
    line |= {f"pass@{k} {reward}": pass_at_k(sampled.rewards[reward], k) for reward in binary for k in numbers}
    lengths = np.sum(sampled.rollout.completion_mask, axis=1)
    line["KL, nats"] = expected(sampled.kl) if sampled.kl is not None and n == 1 else None
    line["KL at most"] = None
    whole = (config.top_k, config.top_p, config.min_p) == (0, 1.0, 0.0)
    if sampled.log_ratio is not None and whole and n > 1:
        # KL(best || first) = KL(best || policy) + E_best[log policy - log first].
        line["KL at most"] = float(best_of_n_kl_bound(n) + expected(sampled.log_ratio).value)
    line |= {"length": expected(lengths).value, "truncated": expected(sampled.rollout.truncated).value}
    tokens = [ids[:size].tolist() for ids, size in zip(sampled.rollout.completions, lengths, strict=True)]
    line["distinct-2"] = distinct_n(tokens, 2) if n == 1 else None
    return line


def completion_lines(name: str, sampled: Sampled, prompts: list[str], config: Config) -> Iterator[dict[str, Any]]:
    """Every completion with its rewards; and for each best of n, the one chosen from the first n of a prompt."""
    group, asked = config.completions, np.repeat(np.array(prompts, object), config.completions)
    rewards = {reward: values.reshape(-1) for reward, values in sampled.rewards.items()}
    proxy = sampled.rewards[config.reward.names[0]]
    for n in sorted({1, *config.best_of}):
        rows = np.arange(len(asked))
        if n > 1:
            rows = np.arange(len(prompts)) * group + np.argmax(proxy[:, :n], axis=1)
        for b in rows.tolist():
            yield {
                "policy": name,
                "best_of": n,
                "prompt": asked[b],
                "completion": sampled.texts[b],
                "rewards": {reward: float(values[b]) for reward, values in rewards.items()},
                "truncated": bool(sampled.rollout.truncated[b]),
            }


def verdict_lines(
    name: str, prompts: list[str], sampled: Sampled, against: Sampled, verdicts: np.ndarray
) -> Iterator[dict[str, Any]]:
    """What the judge said of each pair: of the completion shown first, and of the one it is compared with first."""
    for prompt, text, other, verdict in zip(prompts, sampled.texts, against.texts, verdicts.tolist(), strict=True):
        yield {"policy": name, "prompt": prompt, "completion": text, "against": other, "verdicts": verdict}


def write_lines(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    """Appends one JSON object a line; of several processes the first does."""
    if not is_first():
        return
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def main(config: Config) -> None:
    start = time.perf_counter()
    check(config)
    judge = load_judge(config.judge) if config.judge else None
    policies = {str(folder): load_policy(folder, config.dtype) for folder in config.policies}
    first = next(iter(policies.values()))
    prompts, rewards, encoded, samplings = [], {}, {}, {}
    for name, policy in policies.items():
        prompts = read_prompts(config, first.tokenizer, policy.tokenizer)
        texts = [each.text for each in prompts]
        encoded[name] = encode_prompts(policy.tokenizer, texts, policy.config.context, config.length)
        samplings[name] = make_sampling(config, policy.ends)
        rewards[name] = make_rewards(config.reward, policy.tokenizer, rows_of(prompts, encoded[name]))
    folder = config.run
    on_first(lambda: open_results(folder))

    def sample(name: str, number: int) -> Sampled:
        policy = policies[name]
        compared = len(policies) > 1 and config.temperature > 0 and alike(policy, first)
        reference, key = first if compared else None, step_key(config.seed, Purpose.EVALUATE, number)
        stage = f"complete {name}"
        sampled = complete(policy, reference, encoded[name], rewards[name], samplings[name], key, stage)
        nothing = np.zeros((len(prompts), config.completions))
        return sampled._replace(kl=nothing, log_ratio=nothing) if policy is first else sampled

    samples = {}
    for number, name in enumerate(policies):
        samples[name] = sample(name, number)
        shown = [each.turns for each in prompts]
        write_lines(folder / "completions.jsonl", completion_lines(name, samples[name], shown, config))
    # The best of n of the first policy is compared with completions that it was not chosen from.
    incumbent = sample(next(iter(policies)), len(policies)) if max(config.best_of) > 1 else None
    if not is_first():
        return
    binary = [name for name in config.reward.names if all(is_binary(x.rewards[name]) for x in samples.values())]
    asked = [each.prompt for each in prompts for _ in range(config.completions)]
    rows = []
    for number, (name, sampled) in enumerate(samples.items()):
        against = incumbent or (samples[next(iter(samples))] if number else None)
        wins, verdicts = {}, None
        if against is not None:
            wins = {reward: win_shares(x, against.rewards[reward]) for reward, x in sampled.rewards.items()}
        if against is not None and judge is not None:
            verdicts = ask_judge(judge, asked, sampled.texts, against.texts)
            write_lines(folder / "verdicts.jsonl", verdict_lines(name, asked, sampled, against, verdicts))
            verdicts = verdicts.reshape(len(prompts), config.completions, 2)
            wins[config.judge] = judged_shares(verdicts)
        rows += [row(name, sampled, n, wins, verdicts, binary, config) for n in config.best_of]
    write_table(folder, rows, dataclasses.asdict(config) | {"seconds": time.perf_counter() - start})
    draw_policies(folder / "evaluate.png", rows, [f"reward {name}" for name in config.reward.names])


if __name__ == "__main__":
    run_main(main, Config)
