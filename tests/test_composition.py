"""Which settings of an estimator have an effect, what is refused, and how advantages are put together."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.errors import InputError
from rl_jax.reinforce import composition
from rl_jax.reinforce.composition import Estimator, estimate_advantages
from rl_jax.reinforce.estimators import ESTIMATORS, make_estimator

ALWAYS = {"normalize", "kl", "whiten_advantages", "reward_clip", "overlong_share", "epochs", "minibatches"}
ALWAYS |= {"entropy_coefficient"}
SCALE, KL, CRITIC = (
    {"reward_scale", "whiten_rewards"},
    {"kl_coefficient", "kl_target"},
    {"value_coefficient", "value_clip"},
)
CLIP = {"clip_low", "clip_high"}
OPTIONS = {
    "reinforce": SCALE | KL,
    "reinforce_moving_average": SCALE | KL | {"baseline_decay"},
    "reinforce_value": SCALE | KL | {"value_coefficient", "discount", "gae_lambda"},
    "reinforce_to_go": SCALE | KL | {"discount"},
    "rloo": SCALE | KL | {"sampling_rounds"},
    "remax": SCALE | KL,
    "grpo": KL | CLIP | {"sampling_rounds"},
    "dr_grpo": SCALE | CLIP | {"sampling_rounds"},
    "reinforce_pp": SCALE | KL | CLIP | {"discount"},
    "reinforce_pp_baseline": KL | CLIP | {"sampling_rounds"},
    "dapo": SCALE | CLIP | {"sampling_rounds"},  # its scale weighs rewards against the penalty for length
    "cispo": {"ratio_cap", "sampling_rounds"},
    "gspo": CLIP | {"sampling_rounds"},
    "ppo": SCALE | KL | CRITIC | CLIP | {"discount", "gae_lambda"},
    "ppo_dual_clip": SCALE | KL | CRITIC | CLIP | {"discount", "gae_lambda", "dual_clip"},
    "raft": SCALE | KL | {"sampling_rounds"},
    "awr": SCALE | KL | {"sampling_rounds", "reward_temperature", "weight_cap"},
    "importance_token": SCALE | KL | {"sampling_rounds", "ratio_cap"},
    "importance_sequence": SCALE | KL | {"sampling_rounds", "ratio_cap"},
}


DEFAULTS = {"normalize": "completion", "kl": "k1_reward", "kl_coefficient": 0.05, "kl_target": None}
DEFAULTS |= {"whiten_advantages": False, "reward_scale": 1.0, "reward_clip": math.inf, "whiten_rewards": False}
DEFAULTS |= {"overlong_share": 0.0, "sampling_rounds": 1, "epochs": 1, "minibatches": 1, "entropy_coefficient": 0.0}
DEFAULTS |= {"value_coefficient": 0.1, "value_clip": math.inf, "discount": 1.0, "gae_lambda": 0.95}
DEFAULTS |= {"clip_low": 0.2, "clip_high": 0.2}
TWICE = {"minibatches": 2}
PPO = {"normalize": "token", "whiten_advantages": True, "epochs": 4, "value_clip": 0.2}
SETTINGS = {
    "reinforce_moving_average": {"baseline_decay": 0.95},
    "reinforce_value": {"gae_lambda": 1.0},
    "grpo": {"normalize": "sequence", "kl": "k3_loss", "kl_coefficient": 0.04},
    "dr_grpo": {"normalize": "constant", "kl": "none"},
    "reinforce_pp": {"normalize": "token", "whiten_advantages": True},
    "reinforce_pp_baseline": {"normalize": "token", "kl": "k2_loss", "whiten_advantages": True},
    "dapo": {"normalize": "token", "kl": "none", "clip_high": 0.28, "overlong_share": 0.2, "sampling_rounds": 4}
    | TWICE,
    "cispo": {"normalize": "token", "kl": "none", "ratio_cap": 5.0} | TWICE,
    "gspo": {"normalize": "sequence", "kl": "none", "clip_low": 3e-4, "clip_high": 4e-4} | TWICE,
    "ppo": PPO,
    "ppo_dual_clip": PPO | {"dual_clip": 3.0},
    "awr": {"reward_temperature": 1.0, "weight_cap": 20.0},
    "importance_token": {"ratio_cap": 2.0} | TWICE,
    "importance_sequence": {"ratio_cap": 2.0} | TWICE,
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_options_are_those_that_have_an_effect_with_the_values_of_the_papers(name):
    settings = DEFAULTS | SETTINGS.get(name, {})
    assert ESTIMATORS[name].options == {option: settings[option] for option in ALWAYS | OPTIONS[name]}


def test_rows_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ESTIMATORS["ppo"].epochs = 2
    assert len({*ESTIMATORS.values()}) == len(ESTIMATORS)  # so they can be hashed


def test_options_depend_on_each_other():
    assert "value_clip" not in make_estimator("ppo", epochs=1).options
    assert "baseline_decay" not in make_estimator("reinforce_moving_average", whiten_advantages=True).options
    assert set(make_estimator("ppo", kl="none").options) >= SCALE, "the critic's error is in reward units"
    assert "kl_horizon" in make_estimator("rloo", kl_target=6.0, kl_horizon=100.0).options
    assert make_estimator("rloo", kl_target=6.0).options["kl_horizon"] == 10_000
    assert {"kl_coefficient", "kl_target"} <= set(make_estimator("cispo", kl="k3_loss", kl_coefficient=0.1).options)
    assert not {"kl_coefficient", "kl_target"} & set(make_estimator("rloo", kl="none").options)
    assert not SCALE & set(make_estimator("raft", kl="none").options)
    assert SCALE & set(make_estimator("grpo", overlong_share=0.5, reward_scale=2.0).options)
    for kl in ("k2_loss", "k3_loss", "exact_loss", "none"):
        assert not SCALE & set(make_estimator("rloo", whiten_advantages=True, kl=kl).options)
    assert set(make_estimator("rloo", kl="k2_loss").options) >= SCALE


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("rloo", "clip_high", 0.2),
        ("rloo", "gae_lambda", 0.9),
        ("grpo", "reward_scale", 2.0),
        ("reinforce", "sampling_rounds", 2),
        ("reinforce", "value_clip", 0.2),
        ("dapo", "kl_coefficient", 0.1),
        ("rloo", "kl_horizon", 10.0),
        ("ppo", "ratio_cap", 2.0),
        ("ppo", "no_such_option", 2.0),
        ("ppo", "paper", "another"),
        ("ppo", "loss", "another"),
        ("ppo", "advantages", "another"),
    ],
)
def test_option_without_effect_is_refused_by_name(name, option, value):
    with pytest.raises(InputError, match=f"{option} has no effect for {name}, whose options are normalize, kl, .*"):
        make_estimator(name, **{option: value})


WRONG = [
    ("normalize", "batch", "one of token, sequence, completion, constant"),
    ("kl", "k4", "one of k1_reward, k2_loss"),
]
WRONG += [(name, 0, "at least 1") for name in ("epochs", "minibatches", "sampling_rounds")]
WRONG += [(name, value, "from 0 to 1") for name in ("discount", "gae_lambda", "clip_low") for value in (-0.1, 1.1)]
WRONG += [(name, -0.1, "at least 0") for name in ("kl_coefficient", "entropy_coefficient", "value_coefficient")]
WRONG += [(name, 0.0, "above 0") for name in ("reward_scale", "reward_clip", "kl_target", "value_clip", "clip_high")]
WRONG += [(name, math.nan, "") for name in ("reward_scale", "kl_coefficient", "discount")]
WRONG += [(name, math.inf, "finite") for name in ("kl_coefficient", "reward_scale", "kl_target", "entropy_coefficient")]


@pytest.mark.parametrize(("option", "value", "message"), WRONG)
def test_value_that_cannot_work_is_refused(option, value, message):
    name = "dapo" if option == "sampling_rounds" else "ppo"
    with pytest.raises(InputError, match=f"{option} is .*{message}"):
        make_estimator(name, **{option: value})


def test_more_values_that_cannot_work():
    with pytest.raises(InputError, match=r"dual_clip is 1.2; it must be above 1 \+ clip_high"):
        make_estimator("ppo_dual_clip", dual_clip=1.2)
    with pytest.raises(InputError, match=r"dual_clip is 1.1; it must be above 1 \+ clip_high"):
        make_estimator("ppo_dual_clip", dual_clip=1.1)
    assert make_estimator("ppo_dual_clip", dual_clip=1.21).options["dual_clip"] == 1.21
    with pytest.raises(InputError, match="dual_clip is 3"):
        make_estimator("ppo_dual_clip", clip_high=2.0)
    with pytest.raises(InputError, match=r"kl_coefficient is 0, .* kl_target"):
        make_estimator("rloo", kl_coefficient=0.0, kl_target=6.0)
    with pytest.raises(InputError, match="weight_cap is 0"):
        make_estimator("awr", weight_cap=0.0)
    with pytest.raises(InputError, match="baseline_decay is 2"):
        make_estimator("reinforce_moving_average", baseline_decay=2.0)
    with pytest.raises(InputError, match=r"overlong_share is 1\.5"):
        make_estimator("dapo", overlong_share=1.5)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("ppo", "reward_clip"),
        ("ppo", "value_clip"),
        ("ppo", "clip_high"),
        ("cispo", "ratio_cap"),
        ("awr", "weight_cap"),
    ],
)
def test_limits_may_be_infinite(name, option):
    assert make_estimator(name, **{option: math.inf}).options[option] == math.inf


def test_ends_of_ranges_are_within():
    edges = {"discount": 1.0, "gae_lambda": 0.0, "clip_low": 1.0, "kl_coefficient": 0.0, "epochs": 1, "minibatches": 1}
    assert edges.items() <= make_estimator("ppo", **edges).options.items()
    assert make_estimator("dapo", overlong_share=0.0).options["overlong_share"] == 0


def test_options_reach_fields_and_functions_and_nothing_else():
    changed = make_estimator("ppo", clip_low=0.1, gae_lambda=0.5, epochs=2, kl="none")
    assert changed.loss.func is ESTIMATORS["ppo"].loss.func
    assert changed.loss.keywords == {"clip_low": 0.1, "clip_high": 0.2}
    assert changed.advantages.keywords == {"discount": 1.0, "gae_lambda": 0.5}
    assert (changed.epochs, changed.kl) == (2, "none")
    assert ESTIMATORS["ppo"].loss.keywords == {"clip_low": 0.2, "clip_high": 0.2}
    plain = dataclasses.replace(changed, loss=ESTIMATORS["ppo"].loss, advantages=ESTIMATORS["ppo"].advantages)
    assert dataclasses.replace(plain, epochs=4, kl="k1_reward") == ESTIMATORS["ppo"]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_several_updates_are_for_losses_that_know_who_sampled(name):
    on_policy = {"reinforce", "reinforce_moving_average", "reinforce_value", "reinforce_to_go", "rloo", "remax"}
    for options in ({"epochs": 2}, {"minibatches": 2}):
        if name in on_policy:
            with pytest.raises(InputError, match=f"{name} takes one update from a batch"):
                make_estimator(name, **options)
        else:
            assert make_estimator(name, **options).updates % 2 == 0


def test_whitened_weights_are_no_maximum_likelihood():
    with pytest.raises(InputError, match="raft takes one update from a batch"):
        make_estimator("raft", whiten_advantages=True, epochs=2)


def test_what_the_rows_need():
    needs = {name: (row.critic, row.greedy, row.grouped) for name, row in ESTIMATORS.items()}
    assert [name for name, need in needs.items() if need[0]] == ["reinforce_value", "ppo", "ppo_dual_clip"]
    assert [name for name, need in needs.items() if need[1]] == ["remax"]
    grouped = {"rloo", "grpo", "dr_grpo", "reinforce_pp_baseline", "dapo", "cispo", "gspo", "raft", "awr"}
    assert {name for name, need in needs.items() if need[2]} == grouped | {"importance_token", "importance_sequence"}
    assert make_estimator("ppo", epochs=3, minibatches=2).updates == 6


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_row_says_what_it_is(name):
    row = ESTIMATORS[name]
    assert all(len(text) > 3 for text in (row.paper, row.equation, row.target, row.differs))


# Advantages

MASK = jnp.array([[True, True], [True, False]])
KL = jnp.array([[0.1, 0.3], [-0.2, jnp.nan]])
REWARDS = jnp.array([1.0, 3.0])


def make(advantages, **fields) -> Estimator:
    return Estimator("", "", "", "", advantages, **fields)


def estimate(estimator, **more):
    settings = {"kl_coefficient": jnp.float32(0.5), "group_size": 2, "baseline": jnp.float32(0.25)} | more
    return estimate_advantages(estimator, rewards=REWARDS, kl=KL, mask=MASK, **settings)


def test_a_function_gets_what_it_names():
    seen = {}

    def spy(rewards, token_rewards, mask, group_size, greedy_rewards, *, option):
        seen.update(locals())
        return rewards

    advantages, targets, baseline = estimate(
        make(functools.partial(spy, option=7)), greedy_rewards=jnp.array([5.0, 6.0])
    )
    np.testing.assert_allclose(advantages, [1 - 0.2, 3 + 0.1], rtol=1e-6)
    np.testing.assert_allclose(seen["token_rewards"], [[-0.05, 1 - 0.15], [3 + 0.1, 0]], rtol=1e-6)
    assert (seen["group_size"], seen["option"], seen["greedy_rewards"].tolist()) == (2, 7, [5, 6])
    assert seen["mask"] is MASK
    assert (targets, float(baseline)) == (None, 0.25)


@pytest.mark.parametrize("kl", ["k2_loss", "k3_loss", "exact_loss", "none"])
def test_divergence_is_charged_in_the_reward_or_elsewhere(kl):
    advantages, _, _ = estimate(make(lambda rewards: rewards, kl=kl))
    np.testing.assert_array_equal(advantages, REWARDS)


def test_a_function_of_the_baseline_gives_the_next():
    advantages, _, baseline = estimate(make(lambda rewards, baseline: (rewards - baseline, 2 * baseline), kl="none"))
    np.testing.assert_array_equal(advantages, REWARDS - 0.25)
    assert float(baseline) == 0.5


def test_a_critic_learns_advantages_plus_values_before_whitening():
    values = jnp.array([[2.0, 4.0], [8.0, jnp.nan]])
    raw = jnp.array([[1.0, 2.0], [3.0, 5.0]])
    for whiten in (False, True):
        estimator = make(lambda values: raw, whiten_advantages=whiten)
        advantages, targets, _ = estimate(estimator, values=values)
        np.testing.assert_array_equal(targets, [[3, 6], [11, 0]])
        expected = np.array([[-1.2247448, 0], [1.2247448, 0]]) if whiten else raw
        np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)


def test_whitening_goes_over_tokens():
    advantages, _, _ = estimate(make(lambda rewards: rewards, kl="none", whiten_advantages=True))
    std = np.sqrt(8 / 9)  # of 1, 1 and 3
    np.testing.assert_allclose(advantages, [[-2 / 3 / std, -2 / 3 / std], [4 / 3 / std, 0]], rtol=1e-5)


def test_scale_free_functions_are():
    rewards = jnp.array([1.0, 4.0, 2.0, 5.0])
    for fn in composition.SCALE_FREE:
        np.testing.assert_allclose(fn(rewards, 2), fn(3 * rewards + 1, 2), rtol=1e-3)
