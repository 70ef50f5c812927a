"""The same answers whatever the mesh: along "data", "fsdp" and "tensor", eight devices do what one does."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from experiments.mapped import make_generate, make_learning, make_sum_microbatches, make_update, prompt_indices
from rl_jax import scoring
from rl_jax.errors import InputError
from rl_jax.learner import init_state
from rl_jax.models.config import gpt2, llama
from rl_jax.models.layout import model_axes, put_model, put_shared
from rl_jax.models.reward_model import init_reward_params, make_backbone
from rl_jax.models.transformer import add_value_head, init_params
from rl_jax.preferences.learning import ensemble_update, init_ensemble_state
from rl_jax.preferences.losses import bradley_terry_loss
from rl_jax.pretraining import pretrain_gradient
from rl_jax.reinforce.estimators import ESTIMATORS
from rl_jax.run.spmd import AS_IT_IS, batch_parts, make_mesh, parse_mesh, pmapped, put
from rl_jax.sampling import Sampling
from rl_jax.types import PreferenceBatch

MESHES = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8)]
FEW_MESHES = [
    pytest.param(sizes, marks=() if sizes in ((8, 1, 1), (2, 2, 2)) else pytest.mark.slow) for sizes in MESHES
]
CONFIG = llama(24, 32, layers=2, width=32, heads=8, mlp_width=48)
SAMPLING = Sampling(12, group_size=2, temperature=0.9, eos=(0, 1, 2))
PARAMS, REF_PARAMS = (init_params(jax.random.key(seed), CONFIG) for seed in (1, 2))
PARAMS, REF_PARAMS = (jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, tree) for tree in (PARAMS, REF_PARAMS))
PROMPTS = np.random.default_rng(0).integers(3, 24, (16, 6)).astype(np.int32)
MASK = np.arange(6)[None, :] >= np.arange(16)[:, None] % 5
SGD = optax.sgd(1.0, momentum=0.9)


def mesh_of(sizes):
    shape = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    return make_mesh(jax.devices()[: math.prod(sizes)], shape)


def assert_close(got, expected, atol=3e-5):
    for (path, array), wanted in zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(got)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(array, wanted, rtol=1e-3, atol=atol, err_msg=jax.tree_util.keystr(path))


def pretrained(sizes, config):
    mesh = mesh_of(sizes)
    params = put_model(init_params(jax.random.key(1), config), mesh)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (16, 13)).astype(np.int32)

    def gradient(params, tokens):
        return pretrain_gradient(params, tokens, config, make_sum_microbatches(mesh, 2))

    mapped = pmapped(gradient, mesh, (AS_IT_IS, 0), (model_axes(params, mesh), None))
    return mapped(params, tokens)


@pytest.mark.parametrize(("sizes", "family"), [*((sizes, llama) for sizes in MESHES), ((2, 2, 2), gpt2)])
def test_pretraining(sizes, family):
    config = family(25, 16, layers=2, width=32, heads=8)  # 25 tokens divide over nothing
    assert_close(pretrained(sizes, config), jax.device_get(pretrained((1, 1, 1), config)))


def reinforced(sizes, name, put_reference=put_model):
    """Two RL steps: completions, metrics, and the state after."""
    mesh = mesh_of(sizes)
    estimator = dataclasses.replace(ESTIMATORS[name], sampling_rounds=1)
    update = make_update(make_learning(CONFIG, SAMPLING, mesh, 6, 40), estimator, SGD, group_size=2)
    params = add_value_head(PARAMS, CONFIG) if estimator.critic else PARAMS
    state = put_model(init_state(params, SGD, 0.05), mesh)
    ref_params = put_reference(REF_PARAMS, mesh)

    def step(state, ref_params, key, prompts, mask):
        rollout = make_generate(CONFIG, SAMPLING, mesh)(state.params, key, prompts, mask, prompt_indices(prompts))
        rewards = jnp.mean(rollout.completions % 3 == 0, axis=1)
        greedy_rewards = 0.5 * rewards if estimator.greedy else None
        state, metrics = update(state, ref_params, key, rollout, rewards, greedy_rewards)
        return state, metrics, rollout

    axes = model_axes(state, mesh)
    mapped = pmapped(step, mesh, (AS_IT_IS, AS_IT_IS, None, 0, 0), (axes, None, 0), donate=(0,))
    for number in range(2):
        state, metrics, rollout = mapped(state, ref_params, jax.random.key(number), PROMPTS, MASK)
    assert mapped._cache_size() == 1
    return rollout.completions, metrics, state


@functools.cache
def reinforced_alone(name):
    return jax.device_get(reinforced((1, 1, 1), name))


@functools.cache
def rewarded_alone():
    return jax.device_get(rewarded((1, 1, 1)))


@pytest.mark.parametrize("sizes", FEW_MESHES)
def test_reinforcement(sizes):
    (completions, *others), (expected, *wanted) = reinforced(sizes, "rloo"), reinforced_alone("rloo")
    assert len(np.unique(expected)) > 10
    np.testing.assert_array_equal(completions, expected)
    assert_close(others, wanted)


def judged(members, candidates=2):
    """A batch of 16 prompts for each member, whose candidates differ in length. [M, B, ...]."""
    rng = np.random.default_rng(members)
    shape = (members, 16, candidates, 5)
    lengths = rng.integers(1, 6, shape[:3])
    return PreferenceBatch(
        prompts=np.stack([np.roll(PROMPTS, member, axis=0) for member in range(members)]),
        prompt_mask=np.stack([np.roll(MASK, member, axis=0) for member in range(members)]),
        completions=rng.integers(3, 24, shape).astype(np.int32),
        completion_mask=np.arange(5) < lengths[..., None],
        labels=rng.permuted(np.broadcast_to(np.arange(candidates, dtype=np.float32), shape[:3]), axis=2),
        margins=rng.uniform(size=shape[:2]).astype(np.float32),
    )


def rewarded(sizes, members=2, microbatches=2):
    """Two updates of reward models: metrics, and the state after."""
    mesh = mesh_of(sizes)
    backbone, config = make_backbone(PARAMS, CONFIG, layers=1)
    keys = jax.random.split(jax.random.key(3), members)
    params = jax.vmap(lambda key: init_reward_params(key, backbone, config))(keys)
    state = put_model(init_ensemble_state(params, SGD), mesh)

    def loss(rewards, batch):
        return bradley_terry_loss(rewards, batch.labels, batch.margins)

    def update(state, batch):
        return ensemble_update(state, batch, config, loss, SGD, make_sum_microbatches(mesh, microbatches))

    mapped = pmapped(update, mesh, (AS_IT_IS, 1), (model_axes(state, mesh), None), donate=(0,))
    for number in range(2):
        state, metrics = mapped(state, jax.tree.map(lambda x, by=number: np.roll(x, by, axis=0), judged(members)))
    assert mapped._cache_size() == 1
    return metrics, state


@pytest.mark.parametrize("sizes", FEW_MESHES)
def test_reward_training(sizes):
    (metrics, state), (expected, wanted) = rewarded(sizes), rewarded_alone()
    assert_close(metrics, expected)
    assert_close(state, wanted)
    assert 0 < expected["accuracy"] < 1


@pytest.mark.parametrize("sizes", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (4, 2, 1)])
def test_logits_in_chunks(sizes, monkeypatch):
    expected = reinforced_alone("rloo")
    monkeypatch.setattr(scoring, "CHUNK_BYTES", {"cpu": 1 << 9})
    assert_close(reinforced(sizes, "rloo"), expected)


@pytest.mark.parametrize("sizes", [(8, 1, 1), pytest.param((4, 2, 1), marks=pytest.mark.slow)])
def test_shared_reference(sizes):
    shared = put_shared(REF_PARAMS, mesh_of(sizes))
    for array in jax.tree.leaves(shared):
        if array.ndim > 1:
            assert array.addressable_shards[0].data.size * (8 if sizes == (8, 1, 1) else 2) == array.size
    (completions, *others), (expected, *wanted) = reinforced(sizes, "rloo", put_shared), reinforced_alone("rloo")
    np.testing.assert_array_equal(completions, expected)
    assert_close(others, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"rloo"}))
def test_every_estimator(sizes, name):
    (completions, *others), (expected, *wanted) = reinforced(sizes, name), reinforced_alone(name)
    np.testing.assert_array_equal(completions, expected)
    # Its ratios of single tokens multiply what sums lose in another order.
    assert_close(others, wanted, atol=1e-4 if name == "importance_token" else 3e-5)


def test_layouts_cut_what_divides():
    mesh = mesh_of((2, 2, 2))
    axes = model_axes({"params": PARAMS, "mu": jax.tree.map(lambda x: np.stack([x] * 3), PARAMS)}, mesh)
    block = axes["params"]["block_0"]
    assert block["attention"]["query"]["kernel"] == PartitionSpec("fsdp", "tensor")
    assert block["attention"]["out"]["kernel"] == PartitionSpec("tensor", "fsdp")
    assert block["mlp_norm"]["scale"] == PartitionSpec()
    assert axes["mu"]["block_1"]["mlp"]["down"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert axes["params"]["embedding"]["embedding"] == PartitionSpec("tensor", "fsdp")
    other = model_axes(init_params(jax.random.key(0), gpt2(24, 32, layers=1, width=32, heads=8, tied=False)), mesh)
    mlp = other["block_0"]["mlp"]
    assert (mlp["up"]["bias"], mlp["down"]["bias"]) == (PartitionSpec("tensor"), PartitionSpec())
    assert other["position_embedding"]["embedding"] == PartitionSpec(None, "fsdp")
    assert other["output"]["kernel"] == PartitionSpec("fsdp", "tensor")
    odd = model_axes({"embedding": {"embedding": np.zeros((25, 8))}}, mesh)
    assert odd["embedding"]["embedding"] == PartitionSpec(None, "fsdp")
    shards = put(PARAMS, mesh, model_axes(PARAMS, mesh))["block_0"]["mlp"]["up"]["kernel"].addressable_shards
    assert {shard.data.shape for shard in shards} == {(16, 24)}


def test_meshes_by_name():
    assert parse_mesh("", 8) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert parse_mesh("fsdp=2, tensor=2", 8) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert parse_mesh("tensor=8", 8) == {"data": 1, "fsdp": 1, "tensor": 8}
    assert batch_parts(mesh_of((2, 2, 2))) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=3", r"3 x 1 x 1 needs 3 devices, and there are 8"),
        ("tensor=16", r"1 x 1 x 16 needs 16 devices, and there are 8"),
        ("fsdp=3", r"needs 6 devices, and there are 8"),
        ("model=2", "cannot be read at 'model=2'"),
        ("data=2,data=4", "cannot be read at 'data=4'"),
        ("data=two", "cannot be read at 'data=two'"),
        ("fsdp=0", "cannot be read at 'fsdp=0'"),
    ],
)
def test_meshes_that_cannot_be(text, message):
    with pytest.raises(InputError, match=message):
        parse_mesh(text, 8)
