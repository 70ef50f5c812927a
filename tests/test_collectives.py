"""What devices have to tell each other: the collectives of programs as the experiments map them, as XLA compiles them.

Counted for eight devices. One that stands in a loop counts once, but what `count_collectives` says of loops is told.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_meshes import MASK, PROMPTS, SAMPLING, judged, mesh_of

from benchmarks.growth import count_collectives
from experiments.mapped import make_generate, make_learning, make_sum_microbatches, make_update, prompt_indices
from rl_jax.learner import apply_gradients, init_state, make_optimizer
from rl_jax.models.config import llama
from rl_jax.models.layout import model_axes, put_model
from rl_jax.models.reward_model import init_reward_params, make_backbone
from rl_jax.models.transformer import init_params
from rl_jax.preferences.learning import ensemble_update, init_ensemble_state
from rl_jax.preferences.losses import bradley_terry_loss
from rl_jax.pretraining import pretrain_gradient
from rl_jax.reinforce.estimators import ESTIMATORS
from rl_jax.rollout import generate
from rl_jax.run.spmd import AS_IT_IS, each_device, pmapped

DATA, FSDP, TENSOR = (8, 1, 1), (4, 2, 1), (1, 1, 8)
OPTIMIZER = make_optimizer(1e-3, 0.1, 1.0, (0.9, 0.95))
SCALARS = 256  # bytes: metrics, and how many tokens count


def config_of(layers=2, width=32):
    return llama(40, 32, layers=layers, width=width, heads=8, mlp_width=3 * width // 2)


def parameters(layers=2, width=32):
    return init_params(jax.random.key(1), config_of(layers, width))


def size(tree) -> int:
    """Bytes of a tree of float32."""
    return 4 * sum(np.size(leaf) for leaf in jax.tree.leaves(tree))


def rollout_of(params, key, prompts, mask, index):
    return generate(params, key, prompts, mask, config_of(), SAMPLING, index)


def in_slots(mesh):
    return make_generate(config_of(), SAMPLING, mesh)


def plain(mesh):
    return each_device(rollout_of, mesh, (None, None, 0, 0, 0), 0)


def sampling_program(sizes, sample):
    mesh = mesh_of(sizes)
    mapped = pmapped(sample(mesh), mesh, (AS_IT_IS, None, 0, 0, 0), 0)
    indices = prompt_indices(jnp.asarray(PROMPTS))
    return mapped.lower(put_model(parameters(), mesh), jax.random.key(0), PROMPTS, MASK, indices)


def update_program(sizes, layers=2, width=32):
    """Scores of the reference, the gradient and the update; completions are given."""
    mesh, config = mesh_of(sizes), config_of(layers, width)
    params = parameters(layers, width)
    learning = make_learning(config, SAMPLING, mesh, PROMPTS.shape[1], 40)

    def update(state, ref_params, key, rollout):
        rewards = jnp.mean(rollout.completions % 3 == 0, axis=1)
        return make_update(learning, ESTIMATORS["rloo"], OPTIMIZER, 2)(state, ref_params, key, rollout, rewards)

    state = put_model(init_state(params, OPTIMIZER, 0.05), mesh)
    rollout = jax.eval_shape(
        lambda params: generate(params, jax.random.key(0), PROMPTS, MASK, config, SAMPLING), params
    )
    mapped = pmapped(update, mesh, (AS_IT_IS, AS_IT_IS, None, 0), (model_axes(state, mesh), None), donate=(0,))
    return mapped.lower(state, put_model(params, mesh), jax.random.key(0), rollout)


def pretraining_program(sizes, layers=2, microbatches=1):
    mesh, config = mesh_of(sizes), config_of(layers)

    def update(state, tokens):
        sum_parts = make_sum_microbatches(mesh, microbatches)
        grads, metrics = pretrain_gradient(state.params, tokens, config, sum_parts)
        state, applied = apply_gradients(state, grads, OPTIMIZER)
        return state, metrics | applied

    state = put_model(init_state(parameters(layers), OPTIMIZER, 0.0), mesh)
    mapped = pmapped(update, mesh, (AS_IT_IS, 0), (model_axes(state, mesh), None), donate=(0,))
    return mapped.lower(state, np.zeros((32, 17), np.int32))


def reward_program(sizes, layers=2, microbatches=1, members=2):
    mesh = mesh_of(sizes)
    backbone, config = make_backbone(parameters(layers), config_of(layers))
    keys = jax.random.split(jax.random.key(2), members)

    def loss(rewards, batch):
        return bradley_terry_loss(rewards, batch.labels, batch.margins)

    def update(state, batch):
        return ensemble_update(state, batch, config, loss, OPTIMIZER, make_sum_microbatches(mesh, microbatches))

    params = jax.vmap(lambda key: init_reward_params(key, backbone, config))(keys)
    state = put_model(init_ensemble_state(params, OPTIMIZER), mesh)
    mapped = pmapped(update, mesh, (AS_IT_IS, 1), (model_axes(state, mesh), None), donate=(0,))
    return mapped.lower(state, judged(members))


def collectives(lowered):
    return count_collectives(lowered.compile().as_text())


def difference(more, fewer):
    """What a program has of each kind of collective beyond another."""
    return {kind: more[kind] - fewer.get(kind, 0) for kind in more if more[kind] != fewer.get(kind, 0)}


def by_layer(program, sizes):
    """Collectives of a layer, and of a program of one."""
    one, two = (collectives(program(sizes, layers=layers))[0] for layers in (1, 2))
    return difference(two, one), one


@pytest.mark.parametrize("sample", [in_slots, plain], ids=["slots", "plain"])
def test_devices_sample_each_for_itself(sample):
    assert collectives(sampling_program(DATA, sample)) == ({}, 0, 0)


def test_devices_in_step_ask_whether_all_have_ended():
    counts, size_of_answer, in_loop = collectives(sampling_program(DATA, lambda mesh: rollout_of))
    assert (counts, size_of_answer, in_loop) == ({"all-reduce": 1}, 1, 1)


def test_data_parallel_update_adds_up_the_gradient_once():
    counts, total, in_loops = collectives(update_program(DATA))
    assert counts == {"all-reduce": 5} and in_loops == 0
    assert size(parameters()) < total < size(parameters()) + SCALARS


@pytest.mark.parametrize("microbatches", [1, 4])
def test_data_parallel_pretraining_adds_up_the_gradient_once(microbatches):
    counts, total, in_loops = collectives(pretraining_program(DATA, microbatches=microbatches))
    assert counts == {"all-reduce": 1} and in_loops == 0
    assert size(parameters()) < total < size(parameters()) + SCALARS


@pytest.mark.parametrize("microbatches", [1, 2])
def test_data_parallel_reward_training_adds_up_the_gradients_once(microbatches):
    counts, total, in_loops = collectives(reward_program(DATA, microbatches=microbatches))
    members = 2 * (size(parameters()) + 4 * config_of().width)
    assert counts == {"all-reduce": 2} and in_loops == 0
    assert members < total < members + SCALARS


def test_no_state_is_laid_out_anew_where_parameters_are_cut(capfd):
    """Of the seven matrices of a block each is gathered forwards and backwards, and nothing else is."""
    counts, total, _ = collectives(pretraining_program(FSDP))
    assert counts.keys() == {"all-gather", "all-reduce"}
    assert counts["all-gather"] == 2 * 7 * 2 + 1  # the embedding once for both
    # Gathered twice; and of the sum of gradients half goes over all devices again, since it is not one scatter on CPU.
    assert total < 3.6 * size(parameters())
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "sizes", "of_layer"),
    [
        (pretraining_program, FSDP, {"all-gather": 14}),
        (reward_program, FSDP, {"all-gather": 14}),
        (update_program, FSDP, {"all-gather": 21}),  # the reference goes forwards alone
        (pretraining_program, (2, 2, 2), {"all-gather": 14, "all-reduce": 4}),
        (update_program, (2, 2, 2), {"all-gather": 21, "all-reduce": 6}),
        (reward_program, (2, 2, 2), {"all-gather": 14, "all-reduce": 4}),
        (pretraining_program, TENSOR, {"all-reduce": 4}),
        (update_program, TENSOR, {"all-reduce": 6}),
        (reward_program, TENSOR, {"all-reduce": 4}),
    ],
)
def test_collectives_of_a_layer(program, sizes, of_layer, capfd):
    """Over "tensor" a block adds up twice forwards and twice backwards."""
    found, first = by_layer(program, sizes)
    assert found == of_layer
    assert set(first) <= {"all-gather", "all-reduce"}
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.slow
def test_states_stay_with_their_tokens_where_these_are_few():
    """A part has 40 tokens on each device and a width of 512, so that states would be cheaper to move than matrices."""
    counts, _, in_loops = collectives(update_program(FSDP, width=512))
    assert counts["all-gather"] == 2 * 21 + 3
    assert in_loops == 3 and counts.keys() == {"all-gather", "all-reduce"}  # parts are added up, and nothing gathered
