import dataclasses

import pytest
import tyro

from experiments.options import EstimatorOptions, chosen_estimator, describe_estimator
from experiments.pipeline import Config
from rl_jax.errors import InputError
from rl_jax.reinforce.estimators import ESTIMATORS, make_estimator


def test_every_option_of_every_estimator_can_be_given():
    rows = [*ESTIMATORS.values(), make_estimator("rloo", kl_target=6.0)]
    assert {field.name for field in dataclasses.fields(EstimatorOptions)} == set().union(*(row.options for row in rows))


def test_options_that_are_not_given_are_the_estimators_own():
    chosen = chosen_estimator("ppo", EstimatorOptions(epochs=2, clip_low=0.1), group_size=1)
    assert chosen.options == ESTIMATORS["ppo"].options | {"epochs": 2, "clip_low": 0.1}
    assert chosen_estimator("grpo", EstimatorOptions(), group_size=2) == ESTIMATORS["grpo"]


def test_description_says_the_values_that_hold():
    about = describe_estimator("ppo", EstimatorOptions(clip_low=0.1), group_size=1)
    assert {"name": "ppo", "clip_low": "0.1", "clip_high": "0.2", "value_clip": "0.2"}.items() <= about.items()
    assert "ratio_cap" not in about


def test_description_says_where_the_row_was_changed():
    assert "gradient of" in describe_estimator("ppo", EstimatorOptions(), group_size=1)
    changed = describe_estimator("rloo", EstimatorOptions(kl="k3_loss"), group_size=2)
    assert "gradient of" not in changed and "gradient of (before these options)" in changed


@pytest.mark.parametrize(("name", "option"), [("grpo", "clip_high"), ("dr_grpo", "clip_low"), ("cispo", "ratio_cap")])
def test_limits_of_ratios_are_refused_where_every_ratio_is_one(name, option):
    passes = {"minibatches": 1} if name == "cispo" else {}
    with pytest.raises(InputError, match=f"{option} has no effect for {name} with one update a batch"):
        chosen_estimator(name, EstimatorOptions(**passes, **{option: 0.3}), group_size=2)
    assert chosen_estimator(name, EstimatorOptions(epochs=2, **{option: 0.3}), group_size=2).options[option] == 0.3


def test_values_that_are_false_are_given():
    chosen = chosen_estimator("ppo", EstimatorOptions(whiten_advantages=False, kl_coefficient=0.0), group_size=1)
    assert (chosen.whiten_advantages, chosen.kl_coefficient) == (False, 0.0)


@pytest.mark.parametrize("name", ["rloo", "grpo", "raft"])
def test_groups_of_one_are_refused_where_they_are_compared(name):
    with pytest.raises(
        InputError, match=f"{name} compares the completions of a prompt: give a group_size of at least 2"
    ):
        chosen_estimator(name, EstimatorOptions(), group_size=1)


def test_command_line():
    words = "--reinforce.estimator ppo --reinforce.kl-coefficient 0.2 --reinforce.whiten-advantages False"
    settings = tyro.cli(Config, args=words.split()).reinforce
    assert settings.estimator == "ppo"
    assert settings.options == EstimatorOptions(kl_coefficient=0.2, whiten_advantages=False)
