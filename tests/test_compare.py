"""The numbers and the pairs that a comparison reports, against constants worked out by hand."""

import math

import numpy as np
import pytest

from experiments.compare import Side, _pairs, _summarise
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.reinforce.gradient import Scores
from rl_jax.types import Rollout


def side(rewards, tokens, lengths, tuned, ref, kl):
    """Two prompts, two completions of each, at most three tokens."""
    mask = np.arange(3) < np.array(lengths)[:, None]
    completions = np.where(mask, tokens, 0)
    filled = {name: np.where(mask, value, 0.0) for name, value in {"tuned": tuned, "ref": ref, "kl": kl}.items()}
    rollout = Rollout(
        prompts=np.full((4, 2), 70),
        prompt_mask=np.ones((4, 2), bool),
        completions=completions,
        completion_mask=mask,
        behavior_logprobs=np.zeros((4, 3)),
        truncated=np.array(lengths) == 3,
    )
    scores = Scores(filled["tuned"], np.zeros((4, 3)), filled["kl"])
    return Side(rollout, scores, filled["ref"], -filled["ref"].sum(axis=1), np.array(rewards))


BEFORE = side([0.0, 1.0, 0.0, 0.0], [66, 67, 68], [1, 3, 2, 2], tuned=-3.0, ref=-1.0, kl=0.5)
AFTER = side([2.0, 1.0, 0.0, -1.0], [66, 66, 66], [3, 3, 3, 1], tuned=-1.0, ref=-2.0, kl=0.25)


def test_summary_by_hand():
    summary = _summarise(BEFORE, AFTER, group=2)
    assert summary["reward_before"] == 0.25
    assert summary["reward_after"] == 0.5
    # Pairs of the first prompt: 2 > 0, 2 > 1, 1 > 0, 1 = 1; of the second: two ties and two losses.
    assert summary["win_rate"] == pytest.approx((3.5 + 1) / 8)
    assert summary["kl"] == pytest.approx(0.25 * (3 + 3 + 3 + 1) / 4)  # of the tuned policy's completions
    assert (summary["length_before"], summary["length_after"]) == (2, 2.5)
    assert (summary["truncated_before"], summary["truncated_after"]) == (0.25, 0.75)
    assert summary["reference_perplexity_before"] == pytest.approx(math.e)
    assert summary["reference_perplexity_after"] == pytest.approx(math.e**2)
    # Bigrams before: 66 67, 67 68, 66 67, 66 67; after: 66 66 six times.
    assert (summary["distinct_2_before"], summary["distinct_2_after"]) == (2 / 4, 1 / 6)
    assert summary["reward_after_interval"][0] < 0.5 < summary["reward_after_interval"][1]


def test_pairs_show_the_first_completion_of_each_prompt():
    first, second = _pairs(BEFORE, AFTER, 2, train_tokenizer(["abab abab"], 260))
    assert first["before"]["log_ratio"] == [-2.0]  # tuning made it less likely
    assert first["after"]["log_ratio"] == [1.0, 1.0, 1.0]
    assert [first["after"]["reward"], second["after"]["reward"]] == [2.0, 0.0]
    assert [first["after"]["advantage"], first["before"]["advantage"]] == [1.0, -1.0]
    assert len(second["before"]["tokens"]) == 2
