"""One batch, and what TRL and this library make of it: rewards and log-probabilities in, a gradient out.

TRL's own trainers run, built as its users build them. Only the sampling is replaced, by given completions, and the
model's forward pass, by given log-probabilities. What is masked holds numbers too, on which nothing may depend.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM

from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.microbatch import sum_over_microbatches
from rl_jax.models.huggingface import Policy, save_policy
from rl_jax.models.transformer import init_params
from rl_jax.reinforce.gradient import Scores, supply
from rl_jax.reinforce.objectives import token_weights
from rl_jax.types import Rollout

GROUPS, GROUP_SIZE, LENGTH, VOCAB = 3, 4, 10, 260
COUNT = GROUPS * GROUP_SIZE
LENGTHS = np.array([10, 1, 9, 4, 7, 10, 2, 5, 3, 10, 8, 6])
MASK = np.arange(LENGTH) < LENGTHS[:, None]

RNG = np.random.default_rng(0)
LOGPROBS = -RNG.exponential(2.0, MASK.shape).astype(np.float32)
BEHAVIOR = LOGPROBS + RNG.normal(0, 0.3, MASK.shape).astype(np.float32)
BEHAVIOR[9] = LOGPROBS[9]  # one completion that no clip touches
REFERENCE = LOGPROBS + RNG.normal(0, 0.5, MASK.shape).astype(np.float32)
REWARDS = RNG.normal(0, 1, COUNT).astype(np.float32)
REWARDS[GROUP_SIZE : 2 * GROUP_SIZE] = 0.5  # a group without a signal
PROMPTS = RNG.integers(VOCAB, size=(COUNT, 5)).astype(np.int32)
PROMPT_MASK = np.arange(5) >= np.repeat([0, 2, 4], GROUP_SIZE)[:, None]
COMPLETIONS = RNG.integers(VOCAB, size=MASK.shape).astype(np.int32)
ROLLOUT = jax.tree.map(
    jnp.asarray, Rollout(PROMPTS, PROMPT_MASK, COMPLETIONS, MASK, BEHAVIOR, truncated=LENGTHS == LENGTH)
)
ON_POLICY = dataclasses.replace(ROLLOUT, behavior_logprobs=jnp.asarray(LOGPROBS))

KEEP_GRADIENT = optax.GradientTransformation(  # the optimizer's state is the gradient
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
)
TRAINERS = {"grpo": (trl.GRPOConfig, trl.GRPOTrainer), "rloo": (trl.RLOOConfig, trl.RLOOTrainer)}


class Step(NamedTuple):
    """What a trainer makes of the batch."""

    advantages: np.ndarray  # [B]
    loss: float
    gradient: np.ndarray  # of the loss by the log-probabilities, [B, C]
    metrics: dict[str, float]


def make_tokenizer():
    return train_tokenizer(["the cat sat on the mat, the cat sat"] * 2, VOCAB)


def saved(folder, config, seed=0):
    """A policy with uneven distributions, here and in the folder."""
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, init_params(jax.random.key(seed), config))
    policy = Policy(params, config, make_tokenizer())
    save_policy(folder, policy)
    return policy


def load_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def given_rewards(prompts, **_):
    """The reward function, in TRL's form."""
    return REWARDS.tolist()


def make_trainer(folder, algorithm="grpo", reward_funcs=(given_rewards,), **options):
    """TRL's trainer for the policy in the folder, which is handed the completions instead of sampling.

    With two iterations TRL keeps the old log-probabilities of a batch; without, it takes the ratio to be 1.
    """
    make_settings, make = TRAINERS[algorithm]
    defaults = {"per_device_train_batch_size": COUNT, "num_iterations": 2, "beta": 0.0}
    settings = make_settings(
        output_dir=str(folder / "trl"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        num_generations=GROUP_SIZE,
        max_completion_length=LENGTH,
        **defaults | options,
    )
    trainer = make(
        model=load_model(folder),
        reward_funcs=list(reward_funcs),
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * GROUPS}),
        processing_class=make_tokenizer(),
    )
    prompts = [row[mask].tolist() for row, mask in zip(PROMPTS, PROMPT_MASK, strict=True)]
    completions, sampled = (
        [row[mask].tolist() for row, mask in zip(rows, MASK, strict=True)] for rows in (COMPLETIONS, BEHAVIOR)
    )
    texts = [""] * COUNT
    generated = (prompts, completions, None, texts, sampled, {}, None, None)
    trainer._generate = lambda _: generated if algorithm == "grpo" else (prompts, completions, texts)
    trainer.model.train()  # as its loop does before the first step, with the next line
    trainer.current_gradient_accumulation_steps = settings.gradient_accumulation_steps
    return trainer


def make_batch(trainer):
    """What the trainer makes of the completions before its loss."""
    return trainer._generate_and_score_completions([{"prompt": "a"}] * COUNT)


def give_logprobs(trainer, logprobs, old=BEHAVIOR):
    """Replace the forward pass: of the reference REFERENCE, where no gradient is taken `old`, and else `logprobs`."""

    def score(model, *_, **__):
        if model is trainer.ref_model:
            return torch.tensor(REFERENCE), None, None
        if not torch.is_grad_enabled():
            return torch.tensor(old), None, None
        return logprobs, torch.zeros_like(logprobs), None

    trainer._get_per_token_logps_and_entropies = score


def trl_step(trainer, old=BEHAVIOR):
    """From the rewards to the gradient, of a policy with LOGPROBS that sampled with `old`."""
    logprobs = torch.tensor(LOGPROBS, requires_grad=True)
    give_logprobs(trainer, logprobs, old)
    batch = make_batch(trainer)
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return Step(batch["advantages"].numpy(), loss.item(), logprobs.grad.numpy(), metrics)


def our_step(estimator, rollout=ROLLOUT, microbatches=1):
    """The whole update of a policy whose parameters are the log-probabilities: its gradient [B, C], and metrics."""

    def score(params, _, rows):
        return Scores(params[rows], jnp.zeros((len(rows), LENGTH)), jnp.zeros((len(rows), LENGTH)))

    @jax.jit
    def step(logprobs):
        state, metrics = policy_gradient_update(
            init_state(logprobs, KEEP_GRADIENT, estimator.kl_coefficient),
            rollout,
            jnp.asarray(REWARDS),
            estimator=estimator,
            score_fn=score,
            optimizer=KEEP_GRADIENT,
            group_size=GROUP_SIZE,
            ref_logprobs=jnp.asarray(REFERENCE),
            context=jnp.arange(COUNT),
            sum_parts=functools.partial(sum_over_microbatches, microbatches=microbatches),
        )
        return state.opt_state, metrics

    gradient, metrics = step(jnp.asarray(LOGPROBS))
    return np.asarray(gradient), jax.tree.map(float, metrics)


def our_loss(loss_fn, advantages, normalize, **options):
    """A loss of `objectives` alone: value, gradient [B, C], and the clipped tokens [B, C]."""
    quantities = {"behavior_logprobs": jnp.asarray(BEHAVIOR), "advantages": jnp.asarray(advantages), **options}
    quantities["weights"] = token_weights(jnp.asarray(MASK), normalize)

    @jax.jit
    def step(logprobs):
        return jax.value_and_grad(lambda x: supply(loss_fn, quantities | {"logprobs": x}), has_aux=True)(logprobs)

    (value, clipped), gradient = step(jnp.asarray(LOGPROBS))
    return float(value), np.asarray(gradient), np.asarray(clipped)
