"""The same completions, rewards and log-probabilities here and in TRL: advantages, loss and its gradient agree.

Each test says what TRL's name for an algorithm means here. TRL 1.16 has no critic: of PPO, GAE and whitening over
tokens there is nothing to compare.

True of all: TRL adds 1e-4 to a standard deviation whose denominator is n - 1, as here. Its `epsilon_high` is clip_high,
how far above 1 a ratio counts; for CISPO it is ratio_cap, the bound itself. Its `old_per_token_logps` come from a
second forward pass of the learner, behavior_logprobs from the sampler: what the sampler and the learner disagree by is
part of the ratio here, and a factor beside it in TRL, for vLLM alone.

TRL is optional; where RL_JAX_REQUIRE_PARITY is set, a missing TRL fails.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.errors import InputError
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.masked import masked_sum
from rl_jax.models.config import gpt2, llama
from rl_jax.models.tensors import to_tensors
from rl_jax.reinforce.advantages import (
    group_mean_advantages,
    group_standardized_advantages,
    leave_one_out_advantages,
    whiten,
)
from rl_jax.reinforce.distributions import kl_estimate
from rl_jax.reinforce.estimators import make_estimator
from rl_jax.reinforce.objectives import (
    dual_clip_loss,
    ppo_clip_loss,
    reinforce_loss,
    sequence_importance_loss,
    token_importance_loss,
)
from rl_jax.reinforce.penalties import kl_penalised_rewards, overlong_penalty
from rl_jax.sampling import Sampling
from rl_jax.scoring import make_score_fn, reference_scores, score_completions

if "RL_JAX_REQUIRE_PARITY" in os.environ:
    import trl
else:
    trl = pytest.importorskip("trl")

import torch
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.utils import split_tensor_dict
from trl_and_ours import (
    BEHAVIOR,
    COUNT,
    GROUP_SIZE,
    KEEP_GRADIENT,
    LENGTH,
    LENGTHS,
    LOGPROBS,
    MASK,
    ON_POLICY,
    PROMPT_MASK,
    REFERENCE,
    REWARDS,
    ROLLOUT,
    VOCAB,
    give_logprobs,
    given_rewards,
    load_model,
    make_batch,
    make_trainer,
    our_loss,
    our_step,
    saved,
    trl_step,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")  # TRL's own use

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
TEMPERATURE = 0.7
LLAMA = llama(VOCAB, 16, layers=1, width=16, heads=2, mlp_width=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    saved(path, LLAMA)
    return path


def test_the_batch_has_everything_that_a_clip_tells_apart():
    advantages = np.asarray(group_standardized_advantages(REWARDS, GROUP_SIZE))
    ratio = np.exp(LOGPROBS - BEHAVIOR)
    for sign in (advantages > 0, advantages < 0):
        rows = MASK & sign[:, None]
        assert (ratio[rows] > 1.5).any() and (ratio[rows] < 0.8).any() and (np.abs(ratio[rows] - 1) < 0.2).any()


@pytest.mark.parametrize(
    "algorithm, options, advantage_fn",
    [
        ("grpo", {"scale_rewards": "group"}, group_standardized_advantages),
        ("grpo", {"scale_rewards": "none"}, group_mean_advantages),
        ("rloo", {}, leave_one_out_advantages),
    ],
)
def test_advantages(algorithm, options, advantage_fn, folder):
    """TRL's GRPO does not leave one out when it does not divide: as Dr. GRPO, and (G - 1) / G of RLOO's."""
    theirs = trl_step(make_trainer(folder, algorithm, **options)).advantages
    np.testing.assert_allclose(advantage_fn(jnp.asarray(REWARDS), GROUP_SIZE), theirs, **CLOSE)
    np.testing.assert_array_equal(theirs[GROUP_SIZE : 2 * GROUP_SIZE], 0.0)


NAMES = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo"},
    "cispo": {"loss_type": "cispo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}


def trl_options(estimator):
    """TRL's names for an estimator's settings."""
    options = estimator.options
    clip = {"epsilon": options.get("clip_low", 0.2), "epsilon_high": options.get("clip_high", options.get("ratio_cap"))}
    beta = options["kl_coefficient"] if estimator.kl == "k3_loss" else 0.0
    return clip | {"beta": beta, "use_bias_correction_kl": False}


def overlong_reward(share):
    return get_soft_overlong_punishment(LENGTH, round(share * LENGTH))


def test_what_trl_does_when_told_nothing(folder):
    """The mean over tokens, no KL, and DAPO's clip without its higher upper bound: none of the table's rows."""
    told_nothing = trl.GRPOConfig(output_dir=str(folder / "trl"), use_cpu=True, bf16=False)
    names = ("loss_type", "scale_rewards", "beta", "epsilon", "epsilon_high", "num_iterations")
    assert [getattr(told_nothing, name) for name in names] == ["dapo", "group", 0.0, 0.2, None, 1]


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_the_table_from_rewards_to_gradient(name, folder):
    """Each row with TRL's settings for it in NAMES; DAPO's overlong penalty is one of TRL's reward functions.

    Clipped is a share of the tokens in both. But TRL counts completions for GSPO, and for CISPO tokens of positive
    advantages alone; here a cap shrinks the gradient of a token that is to become less likely as well, and counts it.
    """
    estimator = make_estimator(name, minibatches=1, **({"ratio_cap": 1.2} if name == "cispo" else {}))
    reward_funcs = [given_rewards]
    if estimator.overlong_share:
        reward_funcs.append(overlong_reward(estimator.overlong_share))
    theirs = trl_step(make_trainer(folder, reward_funcs=reward_funcs, **NAMES[name], **trl_options(estimator)))
    gradient, metrics = our_step(estimator)
    np.testing.assert_allclose(gradient, theirs.gradient, **CLOSE)
    np.testing.assert_allclose(metrics["loss"], theirs.loss, **CLOSE)
    np.testing.assert_array_equal(gradient[~MASK], 0.0)

    _, _, clipped = our_loss(estimator.loss, theirs.advantages, estimator.normalize)
    np.testing.assert_allclose(metrics["clipped"], clipped.sum() / MASK.sum(), **CLOSE)
    assert 0 < metrics["clipped"] < 1
    if name == "gspo":
        np.testing.assert_allclose(theirs.metrics["clip_ratio/region_mean"], clipped[:, 0].mean(), **CLOSE)
    elif name == "cispo":
        good = clipped & (theirs.advantages > 0)[:, None]
        np.testing.assert_allclose(theirs.metrics["cispo_clip_ratio"], good.sum() / MASK.sum(), **CLOSE)
        assert 0 < good.sum() < clipped.sum()
    else:
        np.testing.assert_allclose(theirs.metrics["clip_ratio/region_mean"], metrics["clipped"], **CLOSE)


def test_the_kl_in_the_loss(folder):
    """The paper's k3 is TRL's where `use_bias_correction_kl` is off; by default it multiplies k3 by the ratio.

    At ratio 1 that has the gradient of k2: (k3 + 1 - r) grad logprob = -log r grad logprob, with r the reference's
    probability over the policy's. So the KL of TRL's GRPO is kl="k2_loss" here, whose gradient is that of
    KL(policy || reference) token by token, where the paper's is that of KL(reference || policy). TRL logs the term as
    "kl", a mean over tokens; here "kl" is exact, nats a completion.
    """
    plain = trl_step(make_trainer(folder, loss_type="grpo", beta=0.04, use_bias_correction_kl=False))
    k3 = np.asarray(kl_estimate(jnp.asarray(LOGPROBS), jnp.asarray(REFERENCE), "k3"))
    np.testing.assert_allclose(plain.metrics["kl"], k3[MASK].mean(), **CLOSE)

    corrected = trl_step(make_trainer(folder, loss_type="grpo", beta=0.04), old=LOGPROBS)
    k2, paper = (our_step(make_estimator("grpo", kl=kl), rollout=ON_POLICY)[0] for kl in ("k2_loss", "k3_loss"))
    np.testing.assert_allclose(k2, corrected.gradient, **CLOSE)
    assert not np.allclose(paper, k2, **CLOSE)


def test_two_sided_clipping_is_the_dual_clip(folder):
    """TRL's `delta` caps the ratio for positive advantages too, which the upper bound has done before it."""
    theirs = trl_step(make_trainer(folder, loss_type="grpo", delta=1.5))
    options = {"clip_low": 0.2, "clip_high": 0.2}
    value, gradient, _ = our_loss(dual_clip_loss, theirs.advantages, "sequence", **options, dual_clip=1.5)
    np.testing.assert_allclose(gradient, theirs.gradient, **CLOSE)
    np.testing.assert_allclose(value, theirs.loss, **CLOSE)
    _, single, _ = our_loss(ppo_clip_loss, theirs.advantages, "sequence", **options)
    assert not np.allclose(gradient, single)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_importance_sampling(level, folder):
    """TRL corrects for a sampler that deviates from the learner, vLLM, by a factor on a loss whose own ratio is 1.

    The gradients are those of token_importance_loss and sequence_importance_loss. The values are not: TRL's has 1, the
    ratio to itself, where ours has the log-probability. TRL clips its own ratio and this one apart; here there is one
    ratio, from what was sampled to what is learned.
    """
    trainer = make_trainer(
        folder,
        loss_type="grpo",
        vllm_importance_sampling_mode=f"{level}_truncate",
        vllm_importance_sampling_clip_max=1.2,
    )
    trainer.use_vllm = True  # its sampler is not here, and is not asked: the completions are given
    theirs = trl_step(trainer, old=LOGPROBS)
    loss_fn = token_importance_loss if level == "token" else sequence_importance_loss
    _, gradient, clipped = our_loss(loss_fn, theirs.advantages, "sequence", ratio_cap=1.2)
    np.testing.assert_allclose(gradient, theirs.gradient, **CLOSE)
    assert clipped.any() and not clipped[MASK].all()
    np.testing.assert_allclose(theirs.loss, gradient.sum(), **CLOSE)  # -(weight * ratio * A), summed


def test_the_overlong_penalty():
    """TRL counts tokens for the soft part of the length, here it is a share of the longest completion."""
    theirs = overlong_reward(0.4)(completion_ids=[[1] * length for length in LENGTHS])
    assert min(theirs) == -1.0 and max(theirs) == 0.0
    np.testing.assert_allclose(overlong_penalty(jnp.asarray(MASK), 0.4), theirs, **CLOSE)


def test_a_batch_in_parts(folder):
    """TRL's "dapo", like "token" here, divides by the tokens of the whole batch; its "bnpo" by those of each part.

    So a bnpo gradient, unlike any here, depends on how many parts fit the memory.
    """

    def in_parts(loss_type):
        parts = {"per_device_train_batch_size": COUNT // 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2}
        trainer = make_trainer(folder, loss_type=loss_type, **parts)
        give_logprobs(trainer, torch.tensor(LOGPROBS))
        gradients = []
        for batch, logprobs in zip(split_tensor_dict(make_batch(trainer), 2), np.split(LOGPROBS, 2), strict=True):
            leaf = torch.tensor(logprobs, requires_grad=True)
            give_logprobs(trainer, leaf)
            trainer._compute_loss(trainer.model, batch).backward()
            gradients.append(leaf.grad.numpy())
        return np.concatenate(gradients)

    estimator = make_estimator("dapo", overlong_share=0.0, clip_high=0.2, minibatches=1)
    whole, _ = our_step(estimator)
    parts, _ = our_step(estimator, microbatches=2)
    np.testing.assert_allclose(parts, whole, **CLOSE)
    np.testing.assert_allclose(in_parts("dapo"), whole, **CLOSE)
    tokens = np.repeat([MASK[: COUNT // 2].sum(), MASK[COUNT // 2 :].sum()], COUNT // 2)[:, None]
    assert tokens[0] != tokens[-1]
    np.testing.assert_allclose(in_parts("bnpo"), whole * MASK.sum() / (2 * tokens), **CLOSE)
    bnpo = trl_step(make_trainer(folder, loss_type="bnpo")).gradient  # in one part they are the same
    np.testing.assert_allclose(bnpo, whole, **CLOSE)


def test_rloo_on_policy_is_the_papers(folder):
    """At ratio 1, with the KL in the reward as k1, TRL's RLOO has the gradient of the paper's REINFORCE.

    Its loss is minus the mean advantage, 0 but for rounding; ours is minus the mean of advantage times log-probability.
    """
    theirs = trl_step(make_trainer(folder, "rloo", beta=0.05), old=LOGPROBS)
    gradient, _ = our_step(make_estimator("rloo", kl_coefficient=0.05), rollout=ON_POLICY)
    np.testing.assert_allclose(gradient, theirs.gradient, **CLOSE)
    k1 = kl_estimate(jnp.asarray(LOGPROBS), jnp.asarray(REFERENCE), "k1")
    penalised = kl_penalised_rewards(jnp.asarray(REWARDS), k1, jnp.asarray(MASK), 0.05)
    np.testing.assert_allclose(theirs.advantages, leave_one_out_advantages(penalised, GROUP_SIZE), **CLOSE)
    assert abs(theirs.loss) < 1e-6


def test_rloo_off_policy_is_another_algorithm(folder):
    """TRL's RLOO is PPO's clip with a completion as one action: its ratio is the product of those of its tokens.

    Within the clip that is sequence_importance_loss without a cap; beyond it, a completion has no gradient. The paper's
    RLOO has neither ratio nor clip: here it takes one update from a batch, and more are refused.
    """
    with pytest.raises(InputError, match="one update"):
        make_estimator("rloo", epochs=2)
    wide = trl_step(make_trainer(folder, "rloo", epsilon=1e9))
    _, gradient, _ = our_loss(sequence_importance_loss, wide.advantages, "completion", ratio_cap=np.inf)
    np.testing.assert_allclose(gradient, wide.gradient, **CLOSE)

    clipped = trl_step(make_trainer(folder, "rloo"))
    assert 0 < clipped.metrics["clip_ratio/region_mean"] < 1

    def by_completion(logprobs):
        old, whole = (masked_sum(x, MASK, axis=1)[:, None] for x in (BEHAVIOR, logprobs))
        weights = jnp.full((COUNT, 1), 1 / COUNT)
        return ppo_clip_loss(whole, old, jnp.asarray(clipped.advantages), weights, clip_low=0.2, clip_high=0.2)[0]

    value, gradient = jax.value_and_grad(by_completion)(jnp.asarray(LOGPROBS))
    np.testing.assert_allclose(gradient, clipped.gradient, **CLOSE)
    np.testing.assert_allclose(value, clipped.loss, **CLOSE)
    _, paper, _ = our_loss(reinforce_loss, clipped.advantages, "completion")
    silent = (clipped.gradient == 0).all(axis=1) & (clipped.advantages != 0)
    assert silent.any() and (paper[silent][MASK[silent]] != 0).all()


def test_normalised_advantages_are_whitened_by_another_scale(folder):
    """TRL whitens completions, with denominator B - 1 and 1e-4 beside the standard deviation.

    `whiten` takes tokens, the population's variance and 1e-8 beside it, as OpenAI did: over one token a completion the
    two differ by a constant.
    """
    plain, normalised = (
        trl_step(make_trainer(folder, "rloo", normalize_advantages=n)).advantages for n in (False, True)
    )
    ours = np.asarray(whiten(jnp.asarray(plain)[:, None], jnp.ones((COUNT, 1), bool)))[:, 0]
    scale = np.sqrt(plain.var() + 1e-8) / (plain.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(normalised, ours * scale, **CLOSE)
    assert 0.9 < scale < 0.97


# With the model's forward pass: the policy that this library has written, scored and differentiated by TRL.


def transformer_step(policy, reference, estimator, behavior):
    """Log-probabilities [B, C] of both policies, and the gradient of the policy's parameters by their names there."""
    sampling = Sampling(length=LENGTH, group_size=GROUP_SIZE, temperature=TEMPERATURE)

    @jax.jit
    def step(params, ref_params, rollout):
        ref_logprobs, context = reference_scores(ref_params, rollout, policy.config, sampling)
        state, _ = policy_gradient_update(
            init_state(params, KEEP_GRADIENT, estimator.kl_coefficient),
            rollout,
            jnp.asarray(REWARDS),
            estimator=estimator,
            score_fn=make_score_fn(ref_params, policy.config, sampling),
            optimizer=KEEP_GRADIENT,
            group_size=GROUP_SIZE,
            ref_logprobs=ref_logprobs,
            context=context,
        )
        return score_completions(params, rollout, policy.config, sampling).logprobs, ref_logprobs, state.opt_state

    rollout = dataclasses.replace(ROLLOUT, behavior_logprobs=jnp.asarray(behavior))
    logprobs, ref_logprobs, gradient = step(policy.params, reference.params, rollout)
    return np.asarray(logprobs), np.asarray(ref_logprobs), to_tensors(gradient, policy.config)


def test_the_gradient_of_a_transformer(tmp_path):
    """At temperature 0.7, with prompts of several lengths; the temperature is in the ratio, KL and entropy of both.

    TRL's entropy bonus is a mean over tokens whatever the loss is a mean of; here it has the weights of the loss.
    """
    policy, reference = saved(tmp_path / "policy", LLAMA), saved(tmp_path / "reference", LLAMA, seed=1)
    changes = {"kl": "k3_loss", "kl_coefficient": 0.1, "overlong_share": 0.0, "minibatches": 1}
    estimator = make_estimator("dapo", entropy_coefficient=0.02, **changes)
    options = {"temperature": TEMPERATURE, "entropy_coef": 0.02, **NAMES["dapo"], **trl_options(estimator)}
    trainer = make_trainer(tmp_path / "policy", **options)
    trainer.ref_model.load_state_dict(load_model(tmp_path / "reference").state_dict())
    batch = make_batch(trainer)
    scored, ref_scored = batch["old_per_token_logps"].numpy(), batch["ref_per_token_logps"].numpy()
    behavior = np.where(MASK, scored + BEHAVIOR - LOGPROBS, 0.0).astype(np.float32)
    batch["old_per_token_logps"] = torch.tensor(behavior)
    trainer._compute_loss(trainer.model, batch).backward()

    logprobs, ref_logprobs, gradient = transformer_step(policy, reference, estimator, behavior)
    assert np.std(scored[MASK]) > 0.5 and np.abs(scored - ref_scored)[MASK].mean() > 0.5
    np.testing.assert_allclose(logprobs[MASK], scored[MASK], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ref_logprobs[MASK], ref_scored[MASK], rtol=1e-5, atol=1e-5)
    theirs = {name: parameter.grad.numpy() for name, parameter in trainer.model.named_parameters()}
    assert set(theirs) == set(gradient)
    for name, wanted in theirs.items():
        np.testing.assert_allclose(gradient[name], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max(), err_msg=name)


def test_learned_positions_of_padded_prompts(tmp_path):
    """TRL gives its model no positions, so that those of GPT-2 count the padding of a prompt; here they never do.

    Its learner then scores other distributions than its sampler drew from, for every prompt but the longest. (It also
    leaves the model's dropout on while it learns, unless `disable_dropout` says otherwise; there is none here.)
    """
    config = gpt2(VOCAB, 16, layers=1, width=16, heads=2)
    policy = saved(tmp_path, config)
    trainer = make_trainer(tmp_path, temperature=TEMPERATURE, disable_dropout=True)
    scored = make_batch(trainer)["old_per_token_logps"].numpy()
    sampling = Sampling(length=LENGTH, temperature=TEMPERATURE)
    score = jax.jit(lambda params: score_completions(params, ROLLOUT, config, sampling).logprobs)
    logprobs = np.asarray(score(policy.params))
    padded = ~PROMPT_MASK[:, 0]
    longest = MASK & ~padded[:, None]
    np.testing.assert_allclose(logprobs[longest], scored[longest], rtol=1e-5, atol=1e-5)
    assert np.abs(logprobs - scored)[MASK & padded[:, None]].mean() > 0.1
