import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.reinforce.diagnostics import explained_variance, gradient_noise, ratio_metrics

MASK = jnp.array([[True, True], [True, False], [True, True]])
BEHAVIOR = jnp.array([[-1.0, -2.0], [-3.0, jnp.nan], [-1.5, -0.5]])
LOG_RATIO = jnp.array([[0.5, -0.25], [0.75, jnp.nan], [-1.0, 0.25]])


def test_ratios_by_hand():
    metrics = {k: float(v) for k, v in ratio_metrics(BEHAVIOR + LOG_RATIO, BEHAVIOR, MASK).items()}
    weights = np.exp([0.25, 0.75, -0.75])
    assert metrics == {
        "logprob_gap": pytest.approx((0.5 + 0.25 + 0.75 + 1 + 0.25) / 5),
        "ratio_min": pytest.approx(np.exp(-1.0)),
        "ratio_max": pytest.approx(np.exp(0.75)),
        "effective_sample_size": pytest.approx(weights.sum() ** 2 / (weights**2).sum() / 3),
    }


def test_ratios_of_the_policy_itself():
    metrics = ratio_metrics(BEHAVIOR, BEHAVIOR, MASK)
    assert {name: float(value) for name, value in metrics.items()} == {
        "logprob_gap": 0, "ratio_min": 1, "ratio_max": 1, "effective_sample_size": pytest.approx(1)
    }  # fmt: skip


@pytest.mark.parametrize("shift", [-2.0, 2.0])
def test_ratios_all_on_one_side_of_one(shift):
    metrics = ratio_metrics(BEHAVIOR + LOG_RATIO + shift, BEHAVIOR, MASK)
    assert float(metrics["ratio_min"]) == pytest.approx(np.exp(shift - 1), rel=1e-5)
    assert float(metrics["ratio_max"]) == pytest.approx(np.exp(shift + 0.75), rel=1e-5)


def test_effective_sample_size_does_not_overflow():
    far = ratio_metrics(jnp.array([[300.0], [0.0]]), jnp.zeros((2, 1)), jnp.ones((2, 1), bool))
    assert float(far["effective_sample_size"]) == pytest.approx(0.5)


def test_explained_variance_by_hand():
    values, targets = (
        jnp.array([[1.0, 2.0], [4.0, jnp.nan], [0.0, 0.0]]),
        jnp.array([[1.0, 3.0], [5.0, jnp.nan], [1, 0]]),
    )
    expected = 1 - np.var([0, 1, 1, 1, 0]) / np.var([1, 3, 5, 1, 0])
    np.testing.assert_allclose(explained_variance(values, targets, MASK), expected, rtol=1e-6)
    np.testing.assert_allclose(explained_variance(0.1 * values, 0.1 * targets, MASK), expected, rtol=1e-5)
    np.testing.assert_allclose(explained_variance(targets, targets, MASK), 1, rtol=1e-6)
    np.testing.assert_array_equal(explained_variance(values, jnp.ones((3, 2)), MASK), 0)


@pytest.mark.parametrize("at_once", [1, 3, 6])
def test_noise_by_hand(at_once):
    samples = {"a": jnp.asarray(np.random.default_rng(0).normal(1, 1, (6, 2)), jnp.float32), "b": jnp.arange(6.0)}

    def gradient_fn(sample):
        return {"x": 2 * sample["a"], "y": sample["b"] * jnp.ones((3, 1))}

    flat = np.concatenate([2 * np.asarray(samples["a"]), np.tile(np.arange(6.0)[:, None], (1, 3))], axis=1)
    variance = np.trace(np.cov(flat.T))
    signal = np.sum(flat.mean(0) ** 2) - variance / 6
    metrics = gradient_noise(gradient_fn, samples, at_once)
    expected = {
        "grad_variance": variance,
        "grad_signal": signal,
        "grad_snr": signal / (variance / 6),
        "critical_batch_size": variance / signal,
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_two_samples_are_enough_and_no_signal_has_no_batch_size():
    metrics = gradient_noise(lambda x: x, jnp.array([0.0, 1.0]))
    found = {name: float(value) for name, value in metrics.items()}
    assert found == {
        "grad_variance": 0.5, "grad_signal": 0, "grad_snr": 0, "critical_batch_size": pytest.approx(np.nan, nan_ok=True)
    }  # fmt: skip
    assert float(gradient_noise(lambda x: x, jnp.array([1.0, 2.0, 6.0]))["grad_variance"]) == pytest.approx(7)


def test_signal_is_unbiased():
    """The mean of many measurements is the squared norm of the true gradient, where the plain one has noise in it."""
    truth = jnp.array([0.5, -0.2])
    samples = truth[None, None, :] + jax.random.normal(jax.random.key(0), (40_000, 4, 2))
    metrics = jax.jit(jax.vmap(lambda x: gradient_noise(lambda g: g, x)))(samples)
    assert float(jnp.mean(metrics["grad_signal"])) == pytest.approx(0.29, abs=0.02)
    assert float(jnp.mean(metrics["grad_variance"])) == pytest.approx(2, abs=0.02)
    negative = metrics["grad_signal"] <= 0
    assert jnp.any(negative) and jnp.all(jnp.isnan(metrics["critical_batch_size"]) == negative)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="at least 2 samples, not 1"):
        gradient_noise(lambda x: x, jnp.ones((1, 2)))
    for wrong in (
        (BEHAVIOR[:1], BEHAVIOR, MASK),
        (BEHAVIOR, BEHAVIOR, MASK[:, :1]),
        (BEHAVIOR[0], BEHAVIOR[0], MASK[0]),
    ):
        for fn in (ratio_metrics, explained_variance):
            with pytest.raises(AssertionError):
                fn(*wrong)
