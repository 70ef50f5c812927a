import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.reinforce.objectives import (
    dual_clip_loss,
    ppo_clip_loss,
    reinforce_loss,
    sequence_clip_loss,
    sequence_importance_loss,
    token_importance_loss,
    token_weights,
    value_errors,
)

MASK = jnp.array([[True, True, True, True], [True, False, False, False]])
LOGPROBS = jnp.array([[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0]])
WEIGHTS = jnp.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.0, 0.0, 0.0]])
RATIOS = np.array([[2.0, 0.5, 1.1, 1.0], [4.0, 1.0, 1.0, 1.0]])
BEHAVIOR = LOGPROBS - jnp.log(jnp.asarray(RATIOS, jnp.float32))
ADVANTAGES = jnp.array([2.0, -3.0])
BY_TOKEN = jnp.array([[2.0, -1.0, -2.0, 1.0], [-3.0, 9.0, 9.0, 9.0]])
HIDDEN = [0.0, jnp.nan, -jnp.inf]


@pytest.mark.parametrize(
    ("normalize", "long", "short"),
    [("token", 1 / 5, 1 / 5), ("sequence", 1 / 8, 1 / 2), ("completion", 1 / 2, 1 / 2), ("constant", 1 / 8, 1 / 8)],
)
def test_weights_by_hand(normalize, long, short):
    weights = token_weights(MASK, normalize)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, [[long] * 4, [short, 0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("normalize", ["token", "sequence", "completion"])
def test_weight_of_a_single_token_is_one(normalize):
    np.testing.assert_array_equal(token_weights(jnp.array([[True, False]]), normalize), [[1, 0]])


@pytest.mark.parametrize("normalize", ["token", "sequence", "completion", "constant"])
def test_weights_of_nothing_are_zero(normalize):
    np.testing.assert_array_equal(token_weights(jnp.zeros((2, 3), bool), normalize), 0)


@pytest.mark.parametrize("normalize", ["", "batch", "zero"])
def test_unknown_normalisation_is_refused(normalize):
    with pytest.raises(ValueError, match=f"not '{normalize}'"):
        token_weights(MASK, normalize)
    with pytest.raises(AssertionError):
        token_weights(MASK[0], "completion")


def of_ratios(loss_fn, advantages=BY_TOKEN, hidden=0.0, **options):
    """Loss, gradient and clipped tokens at the ratios above; `hidden` stands where nothing should look."""
    logprobs, behavior = (jnp.where(WEIGHTS > 0, x, hidden) for x in (LOGPROBS, BEHAVIOR))

    def loss(logprobs):
        return loss_fn(logprobs, behavior, advantages, WEIGHTS, **options)

    (total, clipped), gradient = jax.value_and_grad(loss, has_aux=True)(logprobs)
    return float(total), np.asarray(gradient), clipped.tolist()


def assert_loss(measured, terms, gradient, clipped):
    """Against by-hand terms [[4], [1]] before weighing, and gradients after."""
    weights = np.asarray(WEIGHTS)
    flat = np.zeros((2, 4))
    flat[0], flat[1, 0] = terms[0], terms[1][0]
    slopes = np.zeros((2, 4))
    slopes[0], slopes[1, 0] = gradient[0], gradient[1][0]
    np.testing.assert_allclose(measured[0], np.sum(weights * flat), rtol=1e-5)
    np.testing.assert_allclose(measured[1], weights * slopes, rtol=1e-5, atol=1e-7)
    assert measured[2] == [clipped[0], [clipped[1][0], False, False, False]]


NEVER = [[False] * 4, [False]]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_reinforce_by_hand(hidden):
    def loss_fn(logprobs, behavior, advantages, weights):
        return reinforce_loss(logprobs, advantages, weights)

    terms, slopes = [[2, 4, 6, 8], [-15]], [[-2] * 4, [3]]
    assert_loss(of_ratios(loss_fn, ADVANTAGES, hidden), terms, slopes, NEVER)
    assert_loss(of_ratios(loss_fn, BY_TOKEN, hidden), [[2, -2, -6, 4], [-15]], [[-2, 1, 2, -1], [3]], NEVER)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_ppo_clip_by_hand(hidden):
    measured = of_ratios(ppo_clip_loss, hidden=hidden, clip_low=0.2, clip_high=0.4)
    terms = [[-2 * 1.4, 0.8, 2 * 1.1, -1], [3 * 4]]
    slopes = [[0, 0, 2 * 1.1, -1], [3 * 4]]  # a bad token that has become likely is not clipped
    assert_loss(measured, terms, slopes, [[True, True, False, False], [False]])


def test_ppo_clip_leaves_good_tokens_below_and_bad_tokens_above():
    measured = of_ratios(ppo_clip_loss, -BY_TOKEN, clip_low=0.2, clip_high=0.4)
    terms, slopes = [[2 * 2, -0.5, -2 * 1.1, 1], [-3 * 1.4]], [[4, -0.5, -2.2, 1], [0]]
    assert_loss(measured, terms, slopes, [[False] * 4, [True]])


def test_no_advantage_is_not_clipped():
    measured = of_ratios(ppo_clip_loss, jnp.zeros(2), clip_low=0.2, clip_high=0.4)
    assert_loss(measured, [[0] * 4, [0]], [[0] * 4, [0]], NEVER)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_dual_clip_by_hand(hidden):
    measured = of_ratios(dual_clip_loss, hidden=hidden, clip_low=0.2, clip_high=0.4, dual_clip=3.0)
    terms, slopes = [[-2 * 1.4, 0.8, 2 * 1.1, -1], [3 * 3]], [[0, 0, 2.2, -1], [0]]
    assert_loss(measured, terms, slopes, [[True, True, False, False], [True]])
    loose = of_ratios(dual_clip_loss, hidden=hidden, clip_low=0.2, clip_high=0.4, dual_clip=5.0)
    plain = of_ratios(ppo_clip_loss, hidden=hidden, clip_low=0.2, clip_high=0.4)
    assert loose[0] == pytest.approx(plain[0]) and loose[2] == plain[2]
    np.testing.assert_allclose(loose[1], plain[1], rtol=1e-6)


def test_dual_clip_bounds_tokens_that_are_hardly_bad_and_none_without_advantage():
    small = of_ratios(dual_clip_loss, 0.1 * BY_TOKEN, clip_low=0.2, clip_high=0.4, dual_clip=1.05)
    terms, slopes = [[-0.2 * 1.4, 0.08, 0.2 * 1.05, -0.1], [0.3 * 1.05]], [[0, 0, 0, -0.1], [0]]
    assert_loss(small, terms, slopes, [[True, True, True, False], [True]])
    none = of_ratios(dual_clip_loss, jnp.zeros(2), clip_low=0.2, clip_high=0.4, dual_clip=1.5)
    assert_loss(none, [[0] * 4, [0]], [[0] * 4, [0]], NEVER)


def test_dual_clip_does_not_bound_good_tokens():
    wide = {"clip_low": 0.2, "clip_high": 9.0}
    measured = of_ratios(dual_clip_loss, jnp.array([1.0, 1.0]), **wide, dual_clip=1.5)
    assert_loss(measured, [[-2, -0.5, -1.1, -1], [-4]], [[-2, -0.5, -1.1, -1], [-4]], NEVER)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_sequence_clip_by_hand(hidden):
    ratio = (2 * 0.5 * 1.1) ** (1 / 4)  # 1.0241, and 4 of the other completion
    measured = of_ratios(sequence_clip_loss, ADVANTAGES, hidden, clip_low=0.2, clip_high=0.4)
    slope = -2 * ratio * 1.0 / 4  # the weights of a completion add up to 1: each token has a quarter of the sum
    terms, slopes = [[-2 * ratio] * 4, [3 * 4]], [[slope / w for w in (0.1, 0.2, 0.3, 0.4)], [12]]
    assert_loss(measured, terms, slopes, NEVER)
    tight = of_ratios(sequence_clip_loss, ADVANTAGES, hidden, clip_low=0.2, clip_high=0.01)
    assert_loss(tight, [[-2 * 1.01] * 4, [12]], [[0] * 4, [12]], [[True] * 4, [False]])
    good = of_ratios(sequence_clip_loss, jnp.array([2.0, 3.0]), hidden, clip_low=0.2, clip_high=0.4)
    assert good[2] == [[False] * 4, [True, False, False, False]]  # no masked token, whatever the completion's ratio


@pytest.mark.parametrize("hidden", HIDDEN)
def test_token_importance_by_hand(hidden):
    measured = of_ratios(token_importance_loss, hidden=hidden, ratio_cap=1.5)
    capped = np.minimum(RATIOS, 1.5)
    terms = [[2 * capped[0, 0], -0.5 * 2, -2 * 1.1 * 3, 4], [-3 * 1.5 * 5]]
    slopes = [[-2 * 1.5, 0.5, 2 * 1.1, -1], [3 * 1.5]]
    assert_loss(measured, terms, slopes, [[True, False, False, False], [True]])
    assert of_ratios(token_importance_loss, hidden=hidden, ratio_cap=np.inf)[2] == [[False] * 4] * 2
    low = of_ratios(token_importance_loss, hidden=hidden, ratio_cap=0.75)
    assert low[2] == [[True, False, True, True], [True, False, False, False]]  # no masked token, its ratio being none


@pytest.mark.parametrize("loss_fn", [token_importance_loss, sequence_importance_loss])
def test_a_ratio_at_the_cap_is_not_clipped(loss_fn):
    _, clipped = loss_fn(LOGPROBS, LOGPROBS, ADVANTAGES, WEIGHTS, ratio_cap=1.0)
    assert not jnp.any(clipped)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_sequence_importance_by_hand(hidden):
    ratio = 2 * 0.5 * 1.1
    measured = of_ratios(sequence_importance_loss, hidden=hidden, ratio_cap=1.5)
    terms = [[2 * ratio, -2 * ratio, -6 * ratio, 4 * ratio], [-15 * 1.5]]
    slopes = [[-2 * ratio, ratio, 2 * ratio, -ratio], [3 * 1.5]]
    assert_loss(measured, terms, slopes, [[False] * 4, [True]])
    low = of_ratios(sequence_importance_loss, hidden=hidden, ratio_cap=1.0)
    assert low[2] == [[True] * 4, [True, False, False, False]]


LOSSES = {
    reinforce_loss: {},
    ppo_clip_loss: {"clip_low": 0.2, "clip_high": 0.2},
    dual_clip_loss: {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0},
    sequence_clip_loss: {"clip_low": 0.2, "clip_high": 0.2},
    token_importance_loss: {"ratio_cap": 2.0},
    sequence_importance_loss: {"ratio_cap": 2.0},
}


def call(loss_fn, logprobs, advantages, weights):
    behavior = () if loss_fn is reinforce_loss else (jax.lax.stop_gradient(logprobs),)
    return loss_fn(logprobs, *behavior, advantages, weights, **LOSSES[loss_fn])


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_before_the_policy_moves_every_gradient_is_that_of_reinforce(loss_fn):
    weights = token_weights(MASK, "sequence")
    slope = jax.grad(lambda x: call(loss_fn, x, ADVANTAGES, weights)[0])(LOGPROBS)
    np.testing.assert_allclose(slope, [[-2 / 8] * 4, [3 / 2, 0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_no_gradient_flows_through_advantages(loss_fn):
    slope = jax.grad(lambda x: call(loss_fn, LOGPROBS, x, WEIGHTS)[0])(BY_TOKEN)
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("loss_fn", LOSSES)
def test_shapes_that_would_broadcast_are_refused(loss_fn):
    for logprobs, advantages, weights in [
        (LOGPROBS[:1], jnp.ones(2), WEIGHTS),
        (LOGPROBS[:1], jnp.ones(1), WEIGHTS),
        (LOGPROBS, jnp.ones(1), WEIGHTS),
        (LOGPROBS, jnp.ones((2, 1)), WEIGHTS),
        (LOGPROBS[0], jnp.ones(4), WEIGHTS[0]),
        (LOGPROBS, jnp.float32(1), WEIGHTS),
    ]:
        with pytest.raises(AssertionError):
            call(loss_fn, logprobs, advantages, weights)
    if loss_fn is not reinforce_loss:
        with pytest.raises(AssertionError):
            loss_fn(LOGPROBS, LOGPROBS[:1], ADVANTAGES, WEIGHTS, **LOSSES[loss_fn])


def test_value_errors_by_hand():
    old = jnp.full((1, 5), 2.0)
    targets = old + jnp.array([[3.0, 3.0, -3.0, -3.0, 0.1]])
    values = old + jnp.array([[1.0, -1.0, 1.0, -1.0, 0.15]])
    errors = value_errors(values=values, old_values=old, targets=targets, value_clip=0.2)
    np.testing.assert_allclose(errors, [[2.8**2 / 2, 16 / 2, 16 / 2, 2.8**2 / 2, 0.05**2 / 2]], rtol=1e-5)
    slopes = jax.grad(lambda x: jnp.sum(value_errors(x, old, targets, value_clip=0.2)))(values)
    np.testing.assert_allclose(slopes, [[0, -4, 4, 0, 0.05]], rtol=1e-5)  # what came near enough is left alone
    unclipped = value_errors(values, old, targets, value_clip=np.inf)
    np.testing.assert_allclose(unclipped, [[2, 8, 8, 2, 0.05**2 / 2]], rtol=1e-5)
    for wrong in ((values, old[0], targets), (values, old[:, :2], targets), (values[0], old[0], targets[0])):
        with pytest.raises(AssertionError):
            value_errors(*wrong, value_clip=0.2)
