import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from enumerable import ALL, BETA, PARAMS, REF, REWARDS, score_all, scores

from rl_jax.learner import apply_gradients, init_state, make_optimizer, policy_gradient_update
from rl_jax.microbatch import sum_over_microbatches
from rl_jax.reinforce.estimators import make_estimator
from rl_jax.run.spmd import make_mesh, pmapped

RATES = np.array([0.1, 0.05, 0.2, 0.1, 0.1], np.float32)
OPTIMIZER = make_optimizer(lambda count: jnp.asarray(RATES)[count], weight_decay=0.3, clip_norm=1.0, betas=(0.8, 0.95))


def toy_params():
    return {"matrix": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([0.3, -0.7]), "gain": jnp.array(2.0)}


def toy_gradients(seed, scale):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32), toy_params())


@jax.jit
def apply(state, grads):
    return apply_gradients(state, grads, OPTIMIZER)


def assert_bitwise(tree, expected):
    for array, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        assert (array.dtype, np.asarray(array).tobytes()) == (wanted.dtype, np.asarray(wanted).tobytes())


def test_updates_are_those_of_adamw_by_hand():
    state = init_state(toy_params(), OPTIMIZER, kl_coefficient=0.25)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), toy_params())
    first, second = (dict.fromkeys(params, 0.0) for _ in range(2))
    norms = []
    for step, scale in enumerate([0.1, 3.0, 0.2, 10.0, 0.05]):
        grads = toy_gradients(step, scale)
        norm = np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in grads.values()))
        norms.append(norm)
        for name, param in params.items():
            grad = np.asarray(grads[name], np.float64) / max(norm, 1)
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.95 * second[name] + 0.05 * grad**2
            mean, square = first[name] / (1 - 0.8 ** (step + 1)), second[name] / (1 - 0.95 ** (step + 1))
            decay = 0.3 * param if param.ndim > 1 else 0.0
            params[name] = param - RATES[step] * (mean / (np.sqrt(square) + 1e-8) + decay)
        state, metrics = apply(state, grads)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        for name, param in params.items():
            np.testing.assert_allclose(state.params[name], param, rtol=1e-5, atol=1e-6)
    assert min(norms) < 1 < max(norms)
    assert int(state.step) == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_update_that_is_not_finite_is_skipped(bad):
    state, _ = apply(init_state(toy_params(), OPTIMIZER, kl_coefficient=0.25), toy_gradients(0, 1.0))
    grads = toy_gradients(1, 1.0)
    broken = grads | {"bias": grads["bias"].at[1].set(bad)}
    skipped, metrics = apply(state, broken)
    assert_bitwise((skipped.params, skipped.opt_state), (state.params, state.opt_state))
    assert (int(skipped.step), int(skipped.nonfinite), int(metrics["nonfinite"])) == (2, 1, 1)
    assert not jnp.isfinite(metrics["grad_norm"])
    twice, metrics = apply(skipped, broken)
    assert (int(twice.step), int(twice.nonfinite), int(metrics["nonfinite"])) == (3, 2, 2)

    resumed, metrics = apply(twice, grads)
    assert (int(resumed.step), int(resumed.nonfinite), int(metrics["nonfinite"])) == (4, 0, 0)
    expected, _ = apply(state, grads)
    assert_bitwise((resumed.params, resumed.opt_state), (expected.params, expected.opt_state))
    assert jnp.any(resumed.params["matrix"] != state.params["matrix"])


def test_initial_state():
    state = init_state(toy_params(), OPTIMIZER, kl_coefficient=0.25)
    assert (int(state.step), int(state.nonfinite)) == (0, 0)
    assert jnp.isnan(state.baseline)
    assert float(state.kl_coefficient) == 0.25
    assert {x.dtype for x in (state.step, state.nonfinite)} == {jnp.dtype("int32")}
    kept, _ = apply(dataclasses.replace(state, baseline=jnp.float32(3.5)), toy_gradients(0, 1.0))
    assert float(kept.baseline) == 3.5


# Steps of an estimator, by a tabular policy


ROLLOUT = dataclasses.replace(ALL, behavior_logprobs=score_all(PARAMS["logits"]))
ROLLOUT, BATCH_REWARDS = jax.tree.map(lambda x: x[jnp.array([0, 3, 5, 6, 1, 2, 3, 4])], (ROLLOUT, REWARDS))
SGD = optax.sgd(0.5)


def policy_scores(params, rollout, _):
    return scores(params, rollout, REF)


@functools.cache
def program(name, score_fn, options, static):
    """A compiled step of a named estimator. Learning rate 0.5."""

    @jax.jit
    def update(state, rollout, rewards, greedy_rewards, key):
        return policy_gradient_update(
            state,
            rollout,
            rewards,
            estimator=make_estimator(name, **dict(options)),
            score_fn=score_fn,
            optimizer=SGD,
            ref_logprobs=scores(PARAMS | {"logits": REF}, rollout, REF).logprobs,
            greedy_rewards=greedy_rewards,
            key=key,
            **dict(static),
        )

    return update


def step(
    name,
    state=None,
    rollout=ROLLOUT,
    rewards=BATCH_REWARDS,
    score_fn=policy_scores,
    greedy_rewards=None,
    key=None,
    **more,
):
    """One step by a named estimator, with arguments of the update or options of the estimator."""
    state = init_state(PARAMS, SGD, BETA) if state is None else state
    static = {"group_size": 2} | {k: more.pop(k) for k in ("group_size", "sum_parts", "noise_at_once") if k in more}
    update = program(name, score_fn, tuple(more.items()), tuple(static.items()))
    return update(state, rollout, rewards, greedy_rewards, key)


def assert_close(tree, expected):
    for array, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6)


def rows_of(tree, rows):
    return jax.tree.map(lambda x: x[np.asarray(rows)], tree)


@jax.jit
def step_by_hand(params, rollout, advantages):
    """A plain gradient step with importance weights up to 2."""

    def loss(params):
        logprobs = scores(params, rollout, REF).logprobs
        ratio = jax.lax.stop_gradient(jnp.exp(logprobs - rollout.behavior_logprobs))
        terms = jnp.where(rollout.completion_mask, jnp.minimum(ratio, 2.0) * advantages[:, None] * logprobs, 0.0)
        return -jnp.sum(terms) / len(terms)

    return jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params))


def by_hand(params, parts):
    """Plain gradient steps over the parts of the batch, with RLOO's advantages of the whole of it."""
    ref = scores(PARAMS | {"logits": REF}, ROLLOUT, REF).logprobs
    kl = jnp.where(ROLLOUT.completion_mask, ROLLOUT.behavior_logprobs - ref, 0.0)
    pairs = (BATCH_REWARDS - BETA * jnp.sum(kl, axis=1)).reshape(-1, 2)
    advantages = (pairs - pairs[:, ::-1]).reshape(-1)
    for rows in parts:
        params = step_by_hand(params, rows_of(ROLLOUT, rows), advantages[rows])
    return params


def test_epochs_go_over_the_batch_again():
    state, _ = step("importance_token", epochs=3, minibatches=1)
    assert_close(state.params, by_hand(PARAMS, [np.arange(8)] * 3))
    assert (int(state.step), int(state.nonfinite)) == (1, 0)


def test_minibatches_are_shuffled_parts_each_with_an_update():
    key = jax.random.key(5)
    orders = [np.argsort(np.asarray(jax.random.uniform(k, (4, 2))), axis=1) for k in jax.random.split(key, 2)]
    parts = [2 * np.arange(4) + order[:, m] for order in orders for m in range(2)]
    assert sorted(np.concatenate(parts[:2]).tolist()) == list(range(8))
    assert parts[0].tolist() != parts[2].tolist()
    state, _ = step("importance_token", epochs=2, minibatches=2, key=key)
    assert_close(state.params, by_hand(PARAMS, parts))
    other, _ = step("importance_token", epochs=2, minibatches=2, key=jax.random.key(6))
    assert jnp.max(jnp.abs(other.params["logits"] - state.params["logits"])) > 1e-4
    with pytest.raises(ValueError, match="need a key"):
        step("importance_token", minibatches=2)


def test_minibatches_do_not_depend_on_devices():
    key = jax.random.key(5)
    rollout, rewards = jax.tree.map(lambda x: jnp.concatenate([x, x]), (ROLLOUT, BATCH_REWARDS))

    def update(rollout, rewards, key):
        return policy_gradient_update(
            init_state(PARAMS, SGD, BETA),
            rollout,
            rewards,
            estimator=make_estimator("ppo", minibatches=2, epochs=2),
            score_fn=lambda params, rollout, _: scores(params, rollout, REF),
            optimizer=SGD,
            group_size=2,
            ref_logprobs=scores(PARAMS | {"logits": REF}, rollout, REF).logprobs,
            key=key,
            sum_parts=functools.partial(sum_over_microbatches, microbatches=2),
            noise_at_once=4,
        )

    mapped = pmapped(update, make_mesh(jax.devices()[:4]), (0, 0, None), None)
    assert_close(mapped(rollout, rewards, key), jax.jit(update)(rollout, rewards, key))
    # Nothing but sums crosses devices: no part of the batch is gathered.
    assert "all-gather" not in mapped.lower(rollout, rewards, key).compile().as_text()


def test_metrics_of_several_updates():
    one, first = step("ppo", epochs=1)
    _, both = step("ppo", epochs=2)
    _, second = step("ppo", epochs=1, state=dataclasses.replace(one, params=one.params))
    assert float(first["ratio_max"]) == pytest.approx(1, abs=1e-5)
    assert float(both["ratio_max"]) > 1.01 and float(both["ratio_min"]) < 0.99
    assert float(both["effective_sample_size"]) < 0.999
    np.testing.assert_allclose(both["ratio_max"], second["ratio_max"], rtol=1e-5)
    np.testing.assert_allclose(both["ratio_min"], second["ratio_min"], rtol=1e-5)
    np.testing.assert_allclose(both["effective_sample_size"], second["effective_sample_size"], rtol=1e-5)
    np.testing.assert_allclose(both["kl"], (first["kl"] + second["kl"]) / 2, rtol=1e-5)
    assert float(both["logprob_gap"]) < 1e-5 < float(second["logprob_gap"])
    assert all(jnp.ndim(value) == 0 for value in both.values())


def test_a_step_of_updates_that_are_not_finite_counts_once():
    state, metrics = step("ppo", rewards=BATCH_REWARDS.at[0].set(jnp.nan), epochs=2)
    assert (int(state.step), int(state.nonfinite), int(metrics["nonfinite"])) == (1, 1, 1)
    assert_bitwise(state.params, PARAMS)
    state, metrics = step("ppo", state=state, rewards=BATCH_REWARDS.at[0].set(jnp.nan), epochs=2)
    assert (int(state.step), int(state.nonfinite), int(metrics["nonfinite"])) == (2, 2, 2)
    state, metrics = step("ppo", state=state, epochs=2)
    assert (int(state.step), int(state.nonfinite), int(metrics["nonfinite"])) == (3, 0, 0)


@pytest.mark.parametrize(("name", "options"), [("ppo", {"epochs": 2}), ("rloo", {})])
def test_microbatches_change_nothing(name, options):
    whole, metrics = step(name, **options)
    parts, same = step(name, **options, sum_parts=functools.partial(sum_over_microbatches, microbatches=4))
    assert_close(parts.params, whole.params)
    assert_close(same, metrics)


def test_critic_learns_the_returns():
    """With no policy to learn, its error falls to the spread of the returns of each prefix."""
    state, metrics = init_state(PARAMS, SGD, 0.0), {}
    errors = []
    for _ in range(60):
        state, metrics = step("reinforce_value", state, value_coefficient=2.0)
        errors.append(float(metrics["value_loss"]))
    first = step("reinforce_value", init_state(PARAMS, SGD, 0.0), value_coefficient=2.0)[1]
    mask = np.asarray(ROLLOUT.completion_mask)
    values = np.asarray(scores(PARAMS, ROLLOUT, REF).values)
    returns = np.broadcast_to(np.asarray(BATCH_REWARDS)[:, None], mask.shape)
    np.testing.assert_allclose(first["value_loss"], np.mean((values - returns)[mask] ** 2) / 2, rtol=1e-5)
    explained = 1 - np.var((returns - values)[mask]) / np.var(returns[mask])
    np.testing.assert_allclose(first["explained_variance"], explained, rtol=1e-4)
    assert errors[-1] < 0.3 * errors[0]
    assert float(metrics["explained_variance"]) > 0


def test_a_value_clip_holds_the_critic_back():
    free, _ = step("ppo", value_clip=np.inf, epochs=8)
    held, _ = step("ppo", value_clip=0.01, epochs=8)
    moves = [jnp.max(jnp.abs(s.params["values"] - PARAMS["values"])) for s in (free, held)]
    assert moves[1] < 0.5 * moves[0]


def test_a_critic_that_is_not_there_is_missed():
    def blind(params, rollout, _):
        return scores(params, rollout, REF)._replace(values=None)

    with pytest.raises(ValueError, match="has a critic, and the policy has none"):
        step("ppo", score_fn=blind)
    assert "value_loss" not in step("rloo", score_fn=blind)[1]


def test_coefficient_is_steered_to_the_target():
    _, metrics = step("rloo")
    kl = float(metrics["kl_k1"])  # what was sampled cost, and not what later updates add
    state, metrics = step("rloo", kl_target=kl / 1.1, kl_horizon=80.0)
    np.testing.assert_allclose(state.kl_coefficient, BETA * (1 + 0.1 * 8 / 80), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl_coefficient"], BETA, rtol=1e-6)
    assert float(step("rloo")[0].kl_coefficient) == pytest.approx(BETA)


def moved(name, **more):
    return step(name, **more)[0].params["logits"] - PARAMS["logits"]


def test_rewards_are_scaled_then_clipped_then_penalised_for_length_before_they_are_charged():
    options = {"overlong_share": 0.5, "reward_scale": 2.0, "reward_clip": 3.0}
    long = 1.0 * (jnp.sum(ROLLOUT.completion_mask, axis=1) == 2)
    expected = moved("rloo", rewards=jnp.minimum(2 * BATCH_REWARDS, 3.0) - long)
    np.testing.assert_allclose(moved("rloo", **options), expected, rtol=1e-5, atol=1e-7)
    assert float(step("rloo", **options)[1]["reward"]) == pytest.approx(float(jnp.mean(BATCH_REWARDS)))


def test_rewards_are_whitened():
    white = (BATCH_REWARDS - jnp.mean(BATCH_REWARDS)) / jnp.std(BATCH_REWARDS)
    np.testing.assert_allclose(moved("rloo", whiten_rewards=True), moved("rloo", rewards=white), rtol=1e-4, atol=1e-6)


def test_greedy_rewards_are_shaped_as_the_others_are():
    greedy = jnp.full(8, 1.75)
    plain = moved("reinforce", rewards=2 * BATCH_REWARDS - 3.5)
    np.testing.assert_allclose(moved("remax", greedy_rewards=greedy, reward_scale=2.0), plain, rtol=1e-5, atol=1e-7)


def test_groups_without_signal_are_counted():
    rewards = jnp.array([1.0, 1, 2, 3, 4, 4, 5, 5])
    assert float(step("rloo", rewards=rewards)[1]["zero_signal_groups"]) == pytest.approx(0.75)
    assert float(step("rloo", rewards=rewards, group_size=4)[1]["zero_signal_groups"]) == 0
    assert "zero_signal_groups" not in step("reinforce", group_size=1)[1]


@pytest.mark.parametrize("normalize", ["completion", "token"])
def test_noise_is_that_of_the_groups(normalize):
    def gradient(rows):
        """The completion gradient of one pair, by an update of its own."""
        part = rows_of(ROLLOUT, rows)
        state, _ = step("rloo", rollout=part, rewards=BATCH_REWARDS[rows])
        return np.asarray(state.params["logits"] - PARAMS["logits"]).ravel() / 0.5

    gradients = np.stack([gradient(np.array([i, i + 1])) for i in range(0, 8, 2)])
    variance = np.trace(np.cov(gradients.T))
    signal = np.sum(gradients.mean(0) ** 2) - variance / 4
    unit = 8 / float(jnp.sum(ROLLOUT.completion_mask)) if normalize == "token" else 1
    _, metrics = step("rloo", normalize=normalize, noise_at_once=2)
    np.testing.assert_allclose(metrics["grad_variance"], unit**2 * variance, rtol=1e-4)
    np.testing.assert_allclose(metrics["grad_snr"], signal / variance * 4, rtol=1e-3)
    assert "grad_variance" not in step("rloo")[1]
