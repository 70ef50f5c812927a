"""Two policies side by side on prompts that neither has learned from: the end of `reinforce.py` and `pipeline.py`."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.complete import SEQUENCES, in_blocks
from experiments.judge import JudgeFn, KeepFn, failures_kept, make_judge
from rl_jax.data.prompt_rows import PromptRows, find_rows
from rl_jax.data.prompts import decode_completions
from rl_jax.data.tokenizer import token_pieces
from rl_jax.evaluation import distinct_n, mean_interval, win_rate
from rl_jax.keys import Purpose, step_key
from rl_jax.models.huggingface import Policy
from rl_jax.models.layout import put_unchanged
from rl_jax.reinforce.advantages import leave_one_out_advantages
from rl_jax.reinforce.gradient import Scores
from rl_jax.rewards.compose import Reward
from rl_jax.rollout import generate
from rl_jax.run.spmd import AS_IT_IS, make_mesh, pmapped
from rl_jax.sampling import Sampling, untruncated
from rl_jax.scoring import Reference, completion_logprobs, completion_states, score_completions
from rl_jax.types import Array, PyTree, Rollout

PAIRS = 8  # prompts whose completions the report shows


@dataclasses.dataclass(frozen=True)
class Comparing:
    """Comparison: before and after, on prompts that RL never saw."""

    prompts: int = 128
    """Prompts that both policies complete."""
    completions: int = 4
    """Completions of each prompt by each policy."""


class Side(NamedTuple):
    """What one of the policies did with the prompts. Every array begins with B = N * G completions.

    Attributes:
        rollout: its completions.
        scores: what the tuned policy says of them, with the exact KL from the pretrained one.
        ref_logprobs: what the pretrained policy says of them, at the sampling temperature. [B, C].
        ref_nats: minus the log-probability of the whole completion under the pretrained policy at temperature 1. [B].
        rewards: [B].
        gold: rewards of the same completions that were not optimised. [B].
    """

    rollout: Rollout
    scores: Scores
    ref_logprobs: np.ndarray
    ref_nats: np.ndarray
    rewards: np.ndarray
    gold: np.ndarray | None = None


def compare(
    settings: Comparing,
    pretrained: Policy,
    tuned: Policy,
    reward: Reward,
    prompts: tuple[np.ndarray, np.ndarray],
    sampling: Sampling,
    seed: int,
    gold: Reward | None = None,
    keep: KeepFn | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Complete the same prompts with both policies, each with random numbers of its own.

    Args:
        settings: how many completions.
        pretrained: the reference policy.
        tuned: of the same configuration.
        reward: what RL maximised.
        prompts: left-padded, int32 [N, P], and their mask.
        sampling: as in RL.
        seed: of the completions.
        gold: another reward, to judge them by too.
        keep: writes the texts of completions whose reward fails.

    Returns:
        What the summary says of it, and the pairs of completions that the report shows.
    """
    config, mesh = pretrained.config, make_mesh()
    sampling = dataclasses.replace(sampling, group_size=settings.completions)
    tempered = untruncated(sampling)
    plain = dataclasses.replace(tempered, temperature=1.0)

    def measure(params: PyTree, tuned: PyTree, ref: PyTree, key: Array, index: Array, prompts: Array, mask: Array):
        rollout = generate(params, key, prompts, mask, config, sampling, index)
        reference = Reference(ref, completion_states(ref, rollout, config))
        scores = score_completions(tuned, rollout, config, tempered, reference)
        ref_nats = -jnp.sum(completion_logprobs(ref, rollout, config, plain), axis=1)
        return rollout, scores, completion_logprobs(ref, rollout, config, tempered), ref_nats

    mapped_measure = pmapped(measure, mesh, (AS_IT_IS, AS_IT_IS, AS_IT_IS, None, 0, 0, 0), 0)
    params = {"before": put_unchanged(pretrained.params, mesh), "after": put_unchanged(tuned.params, mesh)}
    keys = {side: step_key(seed, Purpose.EVALUATE, number) for number, side in enumerate(params)}

    def complete(side: str, judges: Sequence[JudgeFn]) -> Side:
        def block(index: np.ndarray, prompts: tuple[np.ndarray, np.ndarray]) -> Side:
            found = mapped_measure(params[side], params["after"], params["before"], keys[side], index, *prompts)
            return Side(*found, *[judge(found[0]) for judge in judges])

        return in_blocks(block, prompts, SEQUENCES // settings.completions, f"compare {side}")

    with failures_kept("compare", keep) as failures:
        judges = [make_judge(each, pretrained.tokenizer, failures) for each in (reward, gold) if each is not None]
        before, after = complete("before", judges), complete("after", judges)
    summary = _summarise(before, after, settings.completions) | {"reward": reward.name}
    summary |= {} if gold is None else {"gold": gold.name}
    return summary, list(_pairs(before, after, settings.completions, pretrained.tokenizer, reward.rows))


def _summarise(before: Side, after: Side, group: int) -> dict[str, Any]:
    sides = {"before": before, "after": after}
    estimates = {"kl": mean_interval(np.sum(after.scores.kl, axis=1).reshape(-1, group))}
    for judged, wins in (("rewards", "win_rate"), ("gold", "gold_win_rate")):
        old, new = (getattr(side, judged) for side in (before, after))
        if old is not None:
            old, new = old.reshape(-1, group), new.reshape(-1, group)
            name = judged.removesuffix("s")
            estimates |= {f"{name}_before": mean_interval(old), f"{name}_after": mean_interval(new)}
            estimates[wins] = win_rate(new, old)
    summary = {name: estimate.value for name, estimate in estimates.items()}
    summary |= {f"{name}_interval": [estimate.low, estimate.high] for name, estimate in estimates.items()}
    for name, side in sides.items():
        lengths = side.rollout.completion_mask.sum(axis=1)
        rows = [row[:length].tolist() for row, length in zip(side.rollout.completions, lengths, strict=True)]
        summary |= {
            f"length_{name}": float(lengths.mean()),
            f"truncated_{name}": float(side.rollout.truncated.mean()),
            f"reference_perplexity_{name}": math.exp(side.ref_nats.sum() / lengths.sum()),
            f"distinct_2_{name}": distinct_n(rows, 2),
        }
    return summary


def _pairs(
    before: Side, after: Side, group: int, tokenizer: Any, rows: PromptRows = MappingProxyType({})
) -> Iterator[dict[str, Any]]:
    """The first completion of each of the first prompts, by both policies, token by token."""
    prompts = before.rollout.prompts, before.rollout.prompt_mask
    decoded, found = decode_completions(tokenizer, *prompts), find_rows(rows, *prompts)
    asked = [text if each is None else each.turns for text, each in zip(decoded, found, strict=True)]
    for first in range(0, min(PAIRS * group, len(asked)), group):
        shown = {
            name: _completion(side, first, group, tokenizer) for name, side in (("before", before), ("after", after))
        }
        yield {"prompt": asked[first]} | shown


def _completion(side: Side, row: int, group: int, tokenizer: Any) -> dict[str, Any]:
    length = int(side.rollout.completion_mask[row].sum())
    log_ratio = side.scores.logprobs[row] - side.ref_logprobs[row]
    peers = np.asarray(side.rewards[row : row + group])
    return {
        "tokens": token_pieces(tokenizer, side.rollout.completions[row, :length].tolist()),
        "log_ratio": log_ratio[:length].tolist(),
        "reward": float(side.rewards[row]),
        "advantage": float(leave_one_out_advantages(jnp.asarray(peers), group)[0]) if group > 1 else None,
    }
