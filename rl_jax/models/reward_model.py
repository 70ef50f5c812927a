"""Reward models: a Transformer whose state at the last real token a linear head reads, alone or as an ensemble.

The parameters of a member are its backbone's, "reward_head" and "normalizer" beside them; those of an ensemble have one
more leading axis. Letters: K members or candidates, B sequences, P prompt length, C completion length, T = P + C.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from rl_jax.errors import InputError
from rl_jax.models.config import Dtype, TransformerConfig
from rl_jax.models.families import FAMILIES, family, to_settings
from rl_jax.models.huggingface import check_tokenizer, read_model
from rl_jax.models.shards import read_json, reading
from rl_jax.models.tensors import from_tensors, read_tensor, to_tensors
from rl_jax.models.transformer import hidden_states
from rl_jax.run.folder import write_json
from rl_jax.run.processes import is_first
from rl_jax.run.spmd import fetch
from rl_jax.types import Array, PreferenceBatch, PyTree, Rollout

HEAD = "score.weight"  # its name in the classifiers of transformers
ROUNDING = 1e-5  # rewards that differ by less than this share of their size are the same


class RewardModel(NamedTuple):
    """An ensemble of reward models, often of one: parameters [K, ...], the members' configuration, and tokenizer."""

    params: PyTree
    config: TransformerConfig
    tokenizer: Any


def init_reward_params(key: Array, backbone: PyTree, config: TransformerConfig) -> PyTree:
    """A member that begins as a backbone with a random head, of variance 1 / (D + 1) (Stiennon 2020, appendix B).

    Args:
        key: of the head.
        backbone: its parameters, from `make_backbone`.
        config: its configuration.
    """
    kernel = jax.random.normal(key, (config.width, 1)) / (config.width + 1) ** 0.5
    return {**backbone, "reward_head": {"kernel": kernel}, "normalizer": {"mean": jnp.zeros(()), "std": jnp.ones(())}}


def make_backbone(
    params: PyTree, config: TransformerConfig, layers: int | None = None
) -> tuple[PyTree, TransformerConfig]:
    """A language model without its output, and with its first blocks alone where `layers` says so.

    Raises:
        InputError: it has fewer blocks.
    """
    layers = config.layers if layers is None else layers
    if not 1 <= layers <= config.layers:
        raise InputError(f"layers is {layers}; the backbone has {config.layers} blocks to choose from.")
    dropped = {"output", "value_head"} | {f"block_{layer}" for layer in range(layers, config.layers)}
    kept = {name: value for name, value in params.items() if name not in dropped}
    return kept, dataclasses.replace(config, layers=layers, tied=True)


def sequence_rewards(params: PyTree, tokens: Array, mask: Array, config: TransformerConfig) -> Array:
    """What a member's head reads at the last real token of each sequence, before it is normalised.

    Args:
        params: of one member.
        tokens: int32 [B, T].
        mask: true on real tokens; padding may stand on either side. bool [B, T].
        config: the member's configuration.

    Returns:
        float32 [B]; without a meaning for a sequence that has no real token.
    """
    states = hidden_states(params, tokens, mask, config)
    last = mask.shape[1] - 1 - jnp.argmax(jnp.flip(mask, axis=1), axis=1)
    final = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
    return jnp.einsum("bd,dk->bk", final.astype(jnp.float32), params["reward_head"]["kernel"])[:, 0]


def raw_rewards(params: PyTree, rollout: Rollout, config: TransformerConfig) -> Array:
    """A member's reward of each completion, before it is normalised. [B]."""
    tokens = jnp.concatenate([rollout.prompts, rollout.completions], axis=1)
    mask = jnp.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)
    return sequence_rewards(params, tokens, mask, config)


def completion_rewards(params: PyTree, rollout: Rollout, config: TransformerConfig) -> Array:
    """A member's reward of each completion: mean 0 and variance 1 where it was normalised. [B]."""
    normalizer = params["normalizer"]
    return (raw_rewards(params, rollout, config) - normalizer["mean"]) / normalizer["std"]


def candidates_rollout(batch: PreferenceBatch) -> Rollout:
    """Judged candidates as a rollout of B * K sequences, those of a prompt consecutive; its policy is unknown."""
    candidates, length = batch.completions.shape[1:]
    chex.assert_equal_shape([batch.completions, batch.completion_mask])
    completions = batch.completions.reshape(-1, length)
    return Rollout(
        prompts=jnp.repeat(batch.prompts, candidates, axis=0),
        prompt_mask=jnp.repeat(batch.prompt_mask, candidates, axis=0),
        completions=completions,
        completion_mask=batch.completion_mask.reshape(-1, length),
        behavior_logprobs=jnp.zeros(completions.shape),
        truncated=jnp.zeros(len(completions), bool),
    )


def candidate_rewards(params: PyTree, batch: PreferenceBatch, config: TransformerConfig) -> Array:
    """A member's reward of each candidate, before it is normalised. [B, K]."""
    return raw_rewards(params, candidates_rollout(batch), config).reshape(batch.labels.shape)


def ensemble_rewards(params: PyTree, rollout: Rollout, config: TransformerConfig) -> Array:
    """The rewards of every member. [K, B]."""
    return jax.vmap(lambda member: completion_rewards(member, rollout, config))(params)


def members(params: PyTree) -> int:
    """How many members an ensemble has."""
    return jax.tree.leaves(params)[0].shape[0]


def normalize(params: PyTree, rewards: np.ndarray) -> PyTree:
    """The ensemble whose members each give mean 0 and variance 1 where they now give `rewards` [K, M].

    Ziegler 2019, section 2, on samples of the reference policy.

    Raises:
        InputError: a member gives the same reward to all, or none that is finite.
    """
    rewards = np.asarray(rewards, np.float64)
    mean, std = rewards.mean(axis=1), rewards.std(axis=1)
    if not np.isfinite(rewards).all():
        raise InputError("The reward model's rewards are not finite: train it again with a lower learning rate.")
    if not np.all(std > ROUNDING * np.abs(rewards).max()):
        raise InputError("The reward model gives every completion the same reward: train it longer, or on other data.")
    old = params["normalizer"]
    mean = np.asarray(old["mean"]) + mean * np.asarray(old["std"])
    std = std * np.asarray(old["std"])
    return {**params, "normalizer": {"mean": jnp.asarray(mean, jnp.float32), "std": jnp.asarray(std, jnp.float32)}}


def save_reward_model(folder: Path, model: RewardModel) -> None:
    """Write an ensemble: a folder for each member, which `transformers` loads as a classifier of one label.

    `AutoModelForSequenceClassification` gives the reward before it is normalised, of one sequence at a time: without a
    padding token it reads the last token of each. Mean and standard deviation are in reward.json. Of several processes
    the first does it, and all have to ask.
    """
    from rl_jax.data.tokenizer import save_tokenizer  # slow to import

    params = fetch(model.params)
    if not is_first():
        return
    save_tokenizer(folder, model.tokenizer)
    settings = to_settings(model.config, model.tokenizer.eos_token_id, model.tokenizer.bos_token_id)
    classifier = FAMILIES[settings["model_type"]].classifier
    settings |= {"architectures": [classifier], "num_labels": 1, "pad_token_id": None}
    prefix = "transformer." if family(model.config) == "gpt2" else ""
    for number in range(members(params)):
        member = jax.tree.map(lambda x, number=number: x[number], params)
        kernel = member["reward_head"]["kernel"]
        tensors = {prefix + name: value for name, value in to_tensors(member, model.config).items()}
        tensors[HEAD] = np.ascontiguousarray(np.asarray(kernel, np.float32).T)
        place = folder / f"member_{number}"
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / "config.json", settings)
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "reward.json", params["normalizer"])


def load_reward_model(folder: Path, dtype: Dtype = "float32") -> RewardModel:
    """Read an ensemble that `save_reward_model` wrote.

    Raises:
        InputError: the folder is not a reward model, or is damaged.
    """
    from rl_jax.data.tokenizer import load_tokenizer  # slow to import

    path = folder / "reward.json"
    if not path.is_file():
        raise InputError(f"{folder} is not a reward model: it has no reward.json. Give one of train_reward.py's.")
    with reading(path):
        normalizer = _read_normalizer(read_json(path))
    parts, configs = [], []
    for number in range(len(normalizer["mean"])):
        place = folder / f"member_{number}"
        config, tensors = read_model(place, dtype)
        with reading(place / "model.safetensors"):
            head = tensors.get(HEAD)
            if head is None or head.shape != (1, config.width):
                raise InputError(f"It has no reward head of {config.width} numbers ({HEAD}): copy or train it again.")
            kernel = {"kernel": jnp.array(read_tensor(HEAD, head, (1, config.width)).T)}
            parts.append({**from_tensors(tensors, config), "reward_head": kernel})
        configs.append(config)
        if config != configs[0]:
            raise InputError(f"{place} has another config.json than {folder / 'member_0'}: copy or train it again.")
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    tokenizer, _ = check_tokenizer(load_tokenizer(folder), (), configs[0], folder)
    return RewardModel({**params, "normalizer": normalizer}, configs[0], tokenizer)


def _read_normalizer(values: Any) -> dict[str, Array]:
    """Mean and standard deviation of each member [K], of what reward.json holds; ValueError where it is not that."""
    with np.errstate(over="ignore"):
        mean, std = (np.asarray(values[name], np.float32) for name in ("mean", "std"))
    if mean.ndim != 1 or not len(mean) or mean.shape != std.shape:
        raise ValueError("mean and std should be lists of one number for each member")
    if not np.isfinite([mean, std]).all() or not (std > 0).all():
        raise ValueError("mean and std should be finite, and std positive")
    return {"mean": jnp.asarray(mean), "std": jnp.asarray(std)}
