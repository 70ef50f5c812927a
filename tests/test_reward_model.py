"""Reward models: what their score depends on, ensembles, the normalisation, and the way to disk and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.config import gpt2, llama
from rl_jax.models.reward_model import (
    RewardModel,
    candidate_rewards,
    candidates_rollout,
    completion_rewards,
    ensemble_rewards,
    init_reward_params,
    load_reward_model,
    make_backbone,
    normalize,
    save_reward_model,
    sequence_rewards,
)
from rl_jax.models.transformer import hidden_states, init_params
from rl_jax.types import PreferenceBatch

CONFIG = llama(300, 16, 2, 16, 2)


def member(seed, config=CONFIG):
    key = jax.random.key(seed)
    return init_reward_params(key, init_params(jax.random.fold_in(key, 1), config), config)


def ensemble(count, config=CONFIG):
    return jax.tree.map(lambda *x: jnp.stack(x), *[member(seed, config) for seed in range(count)])


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    lengths = np.array([[3, 5], [1, 4], [5, 2], [2, 2]])
    return PreferenceBatch(
        prompts=jnp.asarray(rng.integers(1, 300, (4, 3))),
        prompt_mask=jnp.array([[False, True, True], [True] * 3, [False, False, True], [True] * 3]),
        completions=jnp.asarray(rng.integers(1, 300, (4, 2, 5))),
        completion_mask=jnp.asarray(np.arange(5) < lengths[:, :, None]),
        labels=jnp.array([[1.0, 0.0]] * 4),
        margins=jnp.zeros(4),
    )


def test_the_reward_is_read_at_the_last_real_token(batch):
    params, rows = member(0), []
    found = jax.jit(lambda params, batch: candidate_rewards(params, batch, CONFIG))(params, batch)
    for row, k in np.ndindex(4, 2):
        prompt = np.asarray(batch.prompts[row])[np.asarray(batch.prompt_mask[row])]
        completion = np.asarray(batch.completions[row, k])[np.asarray(batch.completion_mask[row, k])]
        rows.append(np.concatenate([prompt, completion]))
    lengths = np.array([len(row) for row in rows])
    tokens = np.stack([np.pad(row, (0, 8 - len(row))) for row in rows])
    states = jax.jit(lambda tokens, mask: hidden_states(params, tokens, mask, CONFIG))(
        tokens, np.arange(8) < lengths[:, None]
    )
    expected = states[np.arange(8), lengths - 1] @ params["reward_head"]["kernel"][:, 0]
    np.testing.assert_allclose(found.reshape(-1), expected, rtol=1e-4, atol=1e-6)


def test_the_reward_depends_neither_on_padding_nor_on_the_batch(batch):
    params, rollout = member(0), candidates_rollout(batch)
    tokens = jnp.concatenate([rollout.prompts, rollout.completions], axis=1)
    mask = jnp.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)
    rewards = jax.jit(lambda tokens, mask: sequence_rewards(params, tokens, mask, CONFIG))
    alone = jnp.concatenate([rewards(tokens[i : i + 1], mask[i : i + 1]) for i in range(8)])
    padded = [jnp.pad(x, ((0, 0), (2, 4))) for x in (tokens, mask)]
    other = jnp.where(mask, tokens, 7)
    for found in (rewards(tokens, mask), rewards(*padded), rewards(other, mask)):
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-6)
    assert np.ptp(alone) > 1e-3


def test_an_ensemble_is_its_members_side_by_side(batch):
    rollout, params = candidates_rollout(batch), ensemble(3)
    found = jax.jit(lambda params: ensemble_rewards(params, rollout, CONFIG))(params)
    alone = jax.jit(lambda params: completion_rewards(params, rollout, CONFIG))
    for k in range(3):
        np.testing.assert_allclose(found[k], alone(member(k)), rtol=1e-5, atol=1e-6)


def test_normalised_rewards_have_mean_0_and_variance_1(batch):
    rollout, params = candidates_rollout(batch), ensemble(2)
    rewards = jax.jit(lambda params: ensemble_rewards(params, rollout, CONFIG))
    for _ in range(2):  # the second time nothing changes
        params = normalize(params, np.asarray(rewards(params)))
        found = np.asarray(rewards(params))
        np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-5)
        np.testing.assert_allclose(found.std(axis=1), 1, rtol=1e-4)
    with pytest.raises(InputError, match="the same reward"):
        normalize(params, np.full((2, 8), 0.3, np.float32))
    with pytest.raises(InputError, match="not finite"):
        normalize(params, np.full((2, 8), np.nan))


def test_a_smaller_backbone_has_the_first_blocks_and_no_output():
    config = llama(300, 16, 3, 16, 2, tied=False)
    params = init_params(jax.random.key(0), config)
    kept, smaller = make_backbone(params, config, 2)
    assert smaller.layers == 2 and smaller.tied
    assert set(kept) == {"embedding", "final_norm", "block_0", "block_1"}
    assert kept["block_1"] is params["block_1"]
    assert jax.tree.structure(kept) == jax.tree.structure(init_params(jax.random.key(0), smaller))
    with pytest.raises(InputError, match="3 blocks"):
        make_backbone(params, config, 4)


@pytest.mark.parametrize("family", [llama, gpt2])
def test_saved_and_read_again_it_is_the_same(tmp_path, batch, family):
    tokenizer, config = train_tokenizer(["some text to learn from"] * 3, 260), family(300, 16, 1, 16, 2)
    params, rollout = ensemble(2, config), candidates_rollout(batch)
    params = normalize(params, np.asarray(jax.jit(lambda p: ensemble_rewards(p, rollout, config))(params)))
    save_reward_model(tmp_path, RewardModel(params, config, tokenizer))
    model = load_reward_model(tmp_path)
    assert model.config == config and model.tokenizer.get_vocab() == tokenizer.get_vocab()
    jax.tree.map(np.testing.assert_array_equal, model.params, jax.device_get(params))
    settings = json.loads((tmp_path / "member_1" / "config.json").read_text())
    assert settings["architectures"] == [{llama: "Llama", gpt2: "GPT2"}[family] + "ForSequenceClassification"]


def test_what_is_no_reward_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no reward.json"):
        load_reward_model(tmp_path)
    (tmp_path / "reward.json").write_text('{"mean": [0.0]}')
    with pytest.raises(InputError, match=r"reward.json cannot be read"):
        load_reward_model(tmp_path)
    (tmp_path / "reward.json").write_text('{"mean": [0.0], "std": [1.0]}')
    with pytest.raises(InputError, match=r"no config.json"):
        load_reward_model(tmp_path)
