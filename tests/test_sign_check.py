"""The guards against a wrong sign: every estimator passes, every flip is caught and named, and few alarms are false."""

import dataclasses
import inspect

import numpy as np
import pytest

from rl_jax import learner, sign_check
from rl_jax.errors import InputError
from rl_jax.reinforce import composition
from rl_jax.reinforce.estimators import ESTIMATORS, make_estimator
from rl_jax.sign_check import check_preferred, check_signs


def stepped(gradient: np.ndarray, length: float) -> np.ndarray:
    return gradient * length / np.linalg.norm(gradient)


def first_tokens(nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the first token [3], and of the second after each first [3, 3], from logits [4, 3]."""
    probabilities = np.exp(nodes) / np.exp(nodes).sum(axis=1, keepdims=True)
    return probabilities[0], probabilities[1:]


def mean_reward(nodes: np.ndarray) -> float:
    first, second = first_tokens(nodes)
    return float(first[1] / 2 + first @ second[:, 1] / 2)


def divergence(nodes: np.ndarray) -> float:
    first, second = first_tokens(nodes)
    reference = np.exp([0.0, -1.0, 1.0]) / np.exp([0.0, -1.0, 1.0]).sum()
    both = first[:, None] * second
    return float((both * np.log(both / np.outer(reference, reference))).sum())


def slopes(function, nodes: np.ndarray) -> np.ndarray:
    """Central differences."""
    found = np.zeros_like(nodes)
    for place in np.ndindex(nodes.shape):
        bump = np.zeros_like(nodes)
        bump[place] = 1e-5
        found[place] = (function(nodes + bump) - function(nodes - bump)) / 2e-5
    return found


def test_the_step_is_that_of_the_exact_gradient():
    """By central differences of sums over the nine completions, in NumPy."""
    uniform = np.zeros((4, 3))
    signs = check_signs(ESTIMATORS["reinforce"])
    up, down = stepped(slopes(mean_reward, uniform), 0.1), stepped(slopes(divergence, uniform), 0.1)
    np.testing.assert_allclose(signs.reward, (1 / 3, mean_reward(up)), rtol=1e-5)
    assert signs.kl is not None
    np.testing.assert_allclose(signs.kl, (divergence(uniform), divergence(-down)), rtol=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_passes_with_room(name):
    estimator = ESTIMATORS[name]
    signs = check_signs(estimator)
    assert signs.reward[1] - signs.reward[0] > 0.005
    assert (signs.kl is None) == (estimator.kl == "none")
    assert signs.kl is None or signs.kl[0] - signs.kl[1] > 0.04


@pytest.mark.parametrize(
    "name, options",
    [
        ("grpo", {"reward_clip": 1e-3, "entropy_coefficient": 10.0, "overlong_share": 1.0}),
        ("ppo", {"gae_lambda": 0.0, "value_coefficient": 100.0, "reward_scale": 1e-4}),
        ("gspo", {"epochs": 4, "minibatches": 16, "kl": "k1_reward"}),
    ],
)
def test_no_setting_is_a_false_alarm(name, options):
    """The hardest of some 450 that were tried."""
    check_signs(make_estimator(name, **options))


def negated(fn, part=lambda value: -value):
    """The function with its result, or a part of it, times -1, under the same parameters."""

    def flipped(*args, **kwargs):
        return part(fn(*args, **kwargs))

    vars(flipped)["__signature__"] = inspect.signature(fn)
    return flipped


LOWERS, RAISES = "lowers the reward it is given", "raises the KL that it charges for"


@pytest.mark.parametrize("name", ["reinforce", "ppo", "gspo"])
def test_negated_advantages_are_caught(name):
    estimator = ESTIMATORS[name]
    with pytest.raises(InputError, match=LOWERS):
        check_signs(dataclasses.replace(estimator, advantages=negated(estimator.advantages)))


@pytest.mark.parametrize("name", ["reinforce", "dr_grpo"])
def test_a_negated_loss_is_caught(name):
    estimator = ESTIMATORS[name]
    with pytest.raises(InputError, match=LOWERS):
        check_signs(dataclasses.replace(estimator, loss=negated(estimator.loss, lambda two: (-two[0], two[1]))))


def test_a_negative_factor_of_the_reward_is_caught():
    with pytest.raises(InputError, match=LOWERS):
        check_signs(dataclasses.replace(ESTIMATORS["rloo"], reward_scale=-1.0))


@pytest.mark.parametrize(
    "name, module, function",
    [
        ("rloo", composition, "kl_penalised_rewards"),
        ("raft", composition, "kl_penalised_rewards"),
        ("ppo", composition, "token_rewards"),
    ],
)
def test_a_kl_penalty_that_is_added_to_the_reward_is_caught(monkeypatch, name, module, function):
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda rewards, kl, mask, beta: right(rewards, kl, mask, -beta))
    with pytest.raises(InputError, match=RAISES):
        check_signs(ESTIMATORS[name])


def test_the_reference_and_the_policy_in_each_others_place_are_caught(monkeypatch):
    right = learner.kl_estimate
    monkeypatch.setattr(learner, "kl_estimate", lambda logprobs, ref, kind: right(ref, logprobs, kind))
    with pytest.raises(InputError, match=RAISES):
        check_signs(ESTIMATORS["rloo"])


@pytest.mark.parametrize("kl", ["k2_loss", "k3_loss", "exact_loss"])
def test_a_kl_that_is_taken_from_the_loss_is_caught(monkeypatch, kl):
    monkeypatch.setattr(learner, "kl_loss_terms", negated(learner.kl_loss_terms))
    with pytest.raises(InputError, match=RAISES):
        check_signs(make_estimator("grpo", kl=kl))


def test_both_signs_at_once_are_caught(monkeypatch):
    """Ziegler's bug: the reward's sign first."""
    right = composition.kl_penalised_rewards
    monkeypatch.setattr(composition, "kl_penalised_rewards", lambda r, kl, mask, beta: -right(r, kl, mask, beta))
    with pytest.raises(InputError, match=LOWERS):
        check_signs(ESTIMATORS["reinforce"])


def test_what_has_no_effect_is_caught(monkeypatch):
    with pytest.raises(InputError, match="does not raise the reward it is given"):
        check_signs(dataclasses.replace(ESTIMATORS["reinforce"], reward_scale=0.0))
    right = composition.kl_penalised_rewards
    monkeypatch.setattr(composition, "kl_penalised_rewards", lambda r, kl, mask, beta: right(r, kl, mask, 0.0))
    with pytest.raises(InputError, match="does not lower the KL that it charges for"):
        check_signs(ESTIMATORS["reinforce"])


def test_one_program_serves_both_steps(monkeypatch):
    built = []

    def watched(*args):
        built.append(sign_check_pmapped(*args))
        return built[-1]

    sign_check_pmapped = sign_check.pmapped
    monkeypatch.setattr(sign_check, "pmapped", watched)
    check_signs(ESTIMATORS["rloo"])
    assert len(built) == 1 and built[0]._cache_size() == 1


def test_a_reward_that_prefers_the_rejected_is_refused():
    higher = np.repeat([1.0, 0.0], [62, 138])
    with pytest.raises(InputError, match=r"prefers what was rejected \(accuracy 31% on 200 pairs\)"):
        check_preferred(higher, 0.5 * np.ones(200))
    assert check_preferred(1 - higher, 0.5 * np.ones(200)) is None
    assert "no better than chance (accuracy 52% on 200 pairs)" in warned(104, 200)


def warned(right: int, pairs: int) -> str:
    return check_preferred(np.arange(pairs) < right, 0.5 * np.ones(pairs)) or ""


def test_where_refusing_and_warning_begin():
    """Tails of the binomial distribution, by its sum: of 10 pairs, none right has 1/1024, one or none 11/1024."""
    with pytest.raises(InputError, match="its sign is wrong"):
        warned(0, 10)
    assert warned(1, 10) and warned(8, 10) and not warned(9, 10)  # 8 or more: 56/1024, above 5 %; 9 or more: 11/1024


def test_equal_rewards_count_half_and_say_nothing():
    assert "learned nothing" in (check_preferred(np.ones(50), np.ones(50)) or "")
    assert check_preferred(np.repeat([2.0, 1.0], [9, 1]), np.ones(10)) is None
    with pytest.raises(InputError, match="accuracy 25% on 20 pairs"):
        check_preferred(np.repeat([0.0, 1.0], 10), np.ones(20))
    told = check_preferred(np.repeat([2.0, 1.0, 0.0], [2, 6, 2]), np.ones(10))
    assert "accuracy 50% on 10 pairs" in (told or "")


@pytest.mark.parametrize(
    "preferred, rejected, message",
    [
        ([], [], "to be checked on pairs"),
        ([1.0, 2.0], [1.0], "to be checked on pairs"),
        ([1.0, np.nan], [0.0, 0.0], "not finite"),
    ],
)
def test_what_cannot_be_checked_is_refused(preferred, rejected, message):
    with pytest.raises(InputError, match=message):
        check_preferred(np.array(preferred), np.array(rejected))


def test_a_reward_that_knows_nothing_is_seldom_called_upside_down():
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(1000):
        try:
            check_preferred(rng.normal(size=100), rng.normal(size=100))
        except InputError:
            refused += 1
    assert refused <= 5  # 1 is expected
