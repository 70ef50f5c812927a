"""Low-rank adapters: what they compute, what is learned through them, and the scripts that train them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.mapped import make_generate, make_learning, make_update, prompt_indices
from rl_jax.errors import InputError
from rl_jax.learner import init_state
from rl_jax.models.config import gpt2, llama
from rl_jax.models.layout import model_axes, put_model, put_shared
from rl_jax.models.lora import LoRA, check_lora, init_adapters, make_tuning, merge_adapters, with_adapters
from rl_jax.models.transformer import hidden_states, init_params, values
from rl_jax.reinforce.estimators import ESTIMATORS
from rl_jax.rollout import compute_params
from rl_jax.run.spmd import AS_IT_IS, make_mesh, pmapped
from rl_jax.sampling import Sampling

CONFIG = llama(24, 32, layers=1, width=32, heads=4, kv_heads=2, mlp_width=48)
TWO = dataclasses.replace(CONFIG, layers=2)
CONFIGS = {"llama": TWO, "gpt2": gpt2(24, 32, layers=1, width=32, heads=4)}
NAMES = ("query", "key", "value", "out", "gate", "up", "down")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 24, (4, 9)), jnp.int32)
init = jax.jit(init_params, static_argnums=1)


def states(params, config=CONFIG):
    return jax.jit(hidden_states, static_argnums=3)(params, TOKENS, jnp.ones(TOKENS.shape, bool), config)


def random_adapters(config=CONFIG, rank=3, targets=("all",), seed=5):
    """Adapters none of which is 0."""
    shapes = jax.eval_shape(lambda: init_adapters(jax.random.key(0), config, rank, targets))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.15 * rng.normal(size=x.shape)).astype(np.float32), shapes)


def language_loss(params, config=CONFIG):
    """A function of all parameters to differentiate."""
    return jnp.mean(jnp.square(hidden_states(params, TOKENS, jnp.ones(TOKENS.shape, bool), config)[..., :3] - 1))


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_add_their_product_to_the_matrices(name):
    config = CONFIGS[name]
    base, adapters = init(jax.random.key(1), config), random_adapters(config)
    expected = jax.tree.map(np.array, base)
    for block, parts in adapters.items():
        for part, layers in parts.items():
            for layer, found in layers.items():
                low, high = (np.asarray(found[leaf], np.float64) for leaf in ("lora_a", "lora_b"))
                expected[block][part][layer]["kernel"] += (1.5 * low @ high).astype(np.float32)
    merged = merge_adapters(base, adapters, 1.5)
    for array, wanted in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(array, wanted, atol=1e-6)
    beside, plain = states(with_adapters(base, adapters, 1.5), config), states(base, config)
    np.testing.assert_allclose(beside, states(expected, config), atol=2e-5)
    assert jnp.max(jnp.abs(beside - plain)) > 0.1


def test_adapters_begin_with_the_base_exactly():
    base, adapters = init(jax.random.key(1), CONFIG), init_adapters(jax.random.key(2), CONFIG, 4)
    for whole in (with_adapters(base, adapters, 2.0), merge_adapters(base, adapters, 2.0)):
        np.testing.assert_array_equal(states(whole), states(base))
    for path, x in jax.tree_util.tree_leaves_with_path(adapters):
        layer = [key.key for key in path]
        kernel = functools.reduce(lambda tree, name: tree[name], layer[:-1], base)["kernel"]
        if layer[-1] == "lora_a":
            bound = 1 / math.sqrt(kernel.shape[0])
            assert x.shape == (kernel.shape[0], 4) and 0.8 * bound < jnp.max(jnp.abs(x)) <= bound
            assert jnp.std(x) == pytest.approx(bound / math.sqrt(3), rel=0.25)
        else:
            assert x.shape == (4, kernel.shape[1]) and not jnp.any(x)
    lows = [x.ravel()[:8] for x in jax.tree.leaves(adapters) if jnp.any(x)]
    assert len(np.unique(np.stack(lows), axis=0)) == len(lows) == 7


def test_what_else_is_trained_stands_beside_them():
    base, head = init(jax.random.key(1), CONFIG), {"kernel": jnp.ones((32, 1)), "bias": jnp.ones(1)}
    trained = {**random_adapters(), "value_head": head}
    for whole in (with_adapters(base, trained, 2.0), merge_adapters(base, trained, 2.0)):
        assert set(whole) == {*base, "value_head"}
        np.testing.assert_array_equal(values(whole, jnp.ones((2, 32))), [33.0, 33.0])


@pytest.mark.parametrize("targets", [("query", "value"), ("down",), NAMES, ("all",)])
def test_the_layers_that_are_named_are_adapted(targets):
    adapters = jax.eval_shape(lambda: init_adapters(jax.random.key(2), TWO, 2, targets))
    assert set(adapters) == {"block_0", "block_1"}
    for block in adapters.values():
        assert {name for part in block.values() for name in part} == (set(NAMES) if "all" in targets else set(targets))


def test_the_gradient_is_the_chain_rule_on_that_of_the_merged_matrices():
    base, adapters, scale = init(jax.random.key(1), CONFIG), random_adapters(), 0.7
    grads = jax.jit(jax.grad(lambda adapters: language_loss(with_adapters(base, adapters, scale))))(adapters)
    full = jax.jit(jax.grad(language_loss))(merge_adapters(base, adapters, scale))
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    for block, parts in adapters.items():
        for part, layers in parts.items():
            for layer, found in layers.items():
                by_kernel = np.asarray(full[block][part][layer]["kernel"], np.float64)
                low, high = found["lora_a"], found["lora_b"]
                got = grads[block][part][layer]
                size = np.max(np.abs(by_kernel))
                np.testing.assert_allclose(got["lora_a"], scale * by_kernel @ high.T, atol=1e-4 * size)
                np.testing.assert_allclose(got["lora_b"], scale * low.T @ by_kernel, atol=1e-4 * size)


def test_the_gradient_is_that_of_finite_differences():
    base, adapters = init(jax.random.key(1), CONFIG), random_adapters()
    loss = jax.jit(lambda adapters: language_loss(with_adapters(base, adapters, 0.7)))
    grads, direction = jax.jit(jax.grad(loss))(adapters), random_adapters(seed=9)
    ahead, behind = (loss(jax.tree.map(lambda x, d, by=by: x + by * d, adapters, direction)) for by in (1e-2, -1e-2))
    slope = sum(jnp.vdot(x, d) for x, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    assert float(ahead - behind) / 2e-2 == pytest.approx(float(slope), rel=2e-2)


def test_adapters_of_full_rank_reach_any_change():
    base = init(jax.random.key(1), CONFIG)
    change = np.random.default_rng(0).normal(size=(32, 48)).astype(np.float32)
    low, values, high = np.linalg.svd(change, full_matrices=False)
    adapters = {"block_0": {"mlp": {"up": {"lora_a": jnp.asarray(low * values), "lora_b": jnp.asarray(high) / 2}}}}
    merged = merge_adapters(base, adapters, 2.0)
    np.testing.assert_allclose(
        merged["block_0"]["mlp"]["up"]["kernel"], base["block_0"]["mlp"]["up"]["kernel"] + change, atol=1e-5
    )


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_of_the_base_are_not_computed(remat):
    """An update takes 6 flops a parameter and token, 2 of them for the gradients of matrices; remat 8 of which 2."""
    config = llama(64, 64, layers=2, width=128, heads=2, mlp_width=256, remat=remat)
    base, tokens = jax.eval_shape(lambda: init_params(jax.random.key(0), config)), jnp.zeros((8, 33), jnp.int32)
    adapters = jax.eval_shape(lambda: init_adapters(jax.random.key(0), config, 1))

    def flops(fn, *args):
        return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]

    def loss(params, tokens):
        return jnp.mean(hidden_states(params, tokens, jnp.ones(tokens.shape, bool), config))

    full = flops(jax.grad(loss), base, tokens)
    light = flops(
        lambda base, adapters, tokens: jax.grad(lambda x: loss(with_adapters(base, x, 2.0), tokens))(adapters),
        *(base, adapters, tokens),
    )
    assert light / full < (0.78 if not remat else 0.84)


PARAMS = jax.tree.map(lambda x: 6 * x if x.ndim > 1 else x, init(jax.random.key(1), CONFIG))
SAMPLING = Sampling(12, group_size=2, temperature=0.9, eos=(0, 1, 2))
PROMPTS = np.random.default_rng(0).integers(3, 24, (16, 6)).astype(np.int32)
MASK = np.arange(6)[None, :] >= np.arange(16)[:, None] % 5
SGD = optax.sgd(0.5, momentum=0.9)


def reinforced(sizes=(1, 1, 1), config=CONFIG, put_reference=put_model, steps=2):
    """RL steps with adapters: completions, metrics, and the state after."""
    mesh = make_mesh(jax.devices()[: math.prod(sizes)], dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    estimator, tuning = dataclasses.replace(ESTIMATORS["rloo"], sampling_rounds=1), make_tuning(LoRA(3), config)
    update = make_update(make_learning(config, SAMPLING, mesh, 6, 40), estimator, SGD, 2, whole=tuning.whole)
    state = put_model(init_state(random_adapters(config), SGD, 0.05), mesh)
    ref_params = put_reference(compute_params(PARAMS, config), mesh)

    def step(state, ref_params, key, prompts, mask):
        params = tuning.sampled(ref_params, state.params)
        rollout = make_generate(config, SAMPLING, mesh)(params, key, prompts, mask, prompt_indices(prompts))
        rewards = jnp.mean(rollout.completions % 3 == 0, axis=1)
        state, metrics = update(state, ref_params, key, rollout, rewards)
        return state, metrics, rollout

    axes = model_axes(state, mesh)
    mapped = pmapped(step, mesh, (AS_IT_IS, AS_IT_IS, None, 0, 0), (axes, None, 0), donate=(0,))
    for number in range(steps):
        state, metrics, rollout = mapped(state, ref_params, jax.random.key(number), PROMPTS, MASK)
    assert mapped._cache_size() == 1
    return rollout.completions, metrics, state


@functools.cache
def reinforced_alone():
    return jax.device_get(reinforced())


def test_an_update_is_of_adapters_alone_and_of_all_of_them():
    _, metrics, state = reinforced_alone()
    for path, x in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state)):
        assert jax.tree_util.keystr(path).endswith(("['lora_a']", "['lora_b']"))
        assert np.all(np.isfinite(x))
    for new, old in zip(jax.tree.leaves(state.params), jax.tree.leaves(random_adapters()), strict=True):
        assert np.max(np.abs(new - old)) > 1e-4
    assert metrics["logprob_gap"] < 1e-5 and metrics["kl"] > 1e-3


@pytest.mark.parametrize(
    ("sizes", "remat", "put_reference"),
    [
        pytest.param((8, 1, 1), True, put_shared, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), False, put_model, marks=pytest.mark.slow),
        pytest.param((1, 1, 8), True, put_model, marks=pytest.mark.slow),
    ],
)
def test_several_devices_do_what_one_does(sizes, remat, put_reference):
    config = dataclasses.replace(CONFIG, remat=remat)
    (completions, *others), (expected, *wanted) = reinforced(sizes, config, put_reference), reinforced_alone()
    np.testing.assert_array_equal(completions, expected)
    for array, one in zip(jax.tree.leaves(jax.device_get(others)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(array, one, rtol=1e-3, atol=3e-5)


@pytest.mark.slow
def test_bfloat16_samples_what_it_learns_from():
    """Adapters far below the rounding of the matrices still count, to the sampler and to the learner."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    tuning, adapters = make_tuning(LoRA(3), config), jax.tree.map(lambda x: 0.02 * x, random_adapters())
    base = compute_params(PARAMS, config)
    assert jax.tree.structure(tuning.sampled(base, adapters)) == jax.tree.structure(tuning.whole(base, adapters))
    kernel, found = base["block_0"]["mlp"]["up"]["kernel"], adapters["block_0"]["mlp"]["up"]
    change = 2 * found["lora_a"] @ found["lora_b"]
    assert jnp.mean((kernel + change).astype(jnp.bfloat16) == kernel) > 0.9
    _, metrics, _ = reinforced(config=config, steps=1)
    assert float(metrics["logprob_gap"]) < 0.03


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LoRA(-1), r"lora.rank is -1"),
        (LoRA(alpha=16.0), r"lora.alpha has no effect without adapters"),
        (LoRA(targets=("query",)), r"lora.targets has no effect without adapters"),
        (LoRA(4, alpha=0.0), r"lora.alpha is 0.0"),
        (LoRA(4, alpha=math.inf), r"lora.alpha is inf"),
        (LoRA(4, targets=("query", "q_proj")), r"no layer 'q_proj' .* down, gate, key, out, query, up, value, or all"),
        (LoRA(4, targets=()), r"no layer ''"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        check_lora(settings, CONFIG)
    with pytest.raises(InputError, match="no layer 'gate'"):
        check_lora(LoRA(4, targets=("gate",)), CONFIGS["gpt2"])


def test_what_is_not_trained_is_kept_in_the_compute_dtype():
    assert [LoRA(rank).kept_in(dtype) for rank in (0, 4) for dtype in ("float32", "bfloat16")] == [
        *("float32", "float32"),
        *("float32", "bfloat16"),
    ]
    base = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    merged = merge_adapters(base, random_adapters(), 2.0)["block_0"]["mlp"]["up"]["kernel"]
    assert merged.dtype == jnp.float32


def test_alpha_is_twice_the_rank_or_what_is_given():
    assert (LoRA(4).scale, LoRA(8).scale, LoRA(4, alpha=2.0).scale, LoRA(8, alpha=2.0).scale) == (2, 2, 0.5, 0.25)
