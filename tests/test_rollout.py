import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax import rollout as rollout_module
from rl_jax.errors import InputError
from rl_jax.models.config import TransformerConfig, gpt2, llama
from rl_jax.models.transformer import hidden_states, init_params, logits
from rl_jax.rollout import check_lengths, generate, sequence_uniforms
from rl_jax.run.spmd import make_mesh, pmapped
from rl_jax.sampling import Sampling
from rl_jax.scoring import completion_logprobs

VOCAB, CONTEXT, PROMPT_LENGTH, LENGTH = 13, 32, 5, 7
CONFIG = llama(VOCAB, CONTEXT, 1, 16, 4, kv_heads=2, mlp_width=32)
GPT2 = gpt2(VOCAB, CONTEXT, 2, 16, 2)
RNG = np.random.default_rng(0)
PROMPTS = RNG.integers(VOCAB, size=(8, PROMPT_LENGTH)).astype(np.int32)
MASK = np.arange(PROMPT_LENGTH) >= np.array([0, 1, 2, 3, 4, 0, 2, 1])[:, None]
KEY = jax.random.key(5)
STOPPING = Sampling(length=LENGTH, group_size=2, eos=(3, 8))
ON = dataclasses.replace(STOPPING, ignore_eos=True)

run = jax.jit(generate, static_argnames=("config", "sampling"))


@functools.cache
def random_params(config: TransformerConfig = CONFIG, seed: int = 1):
    """Parameters large enough for uneven distributions, none of them left at 0 or 1."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    rng = np.random.default_rng(seed)

    def fill(path, shape):
        return rng.normal(path[-1].key == "scale", 0.2, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def sampled(sampling: Sampling = ON):
    return run(random_params(), KEY, PROMPTS, MASK, CONFIG, sampling)


def cut(rollout, ends):
    """What a rollout that ignored the end should be when it stops at the first of the tokens `ends`."""
    completions, logprobs = np.array(rollout.completions), np.array(rollout.behavior_logprobs)
    mask, truncated = np.ones(completions.shape, bool), np.ones(len(completions), bool)
    for row, tokens in enumerate(completions):
        for column, token in enumerate(tokens):
            if token in ends:
                mask[row, column + 1 :] = truncated[row] = False
                break
    return dataclasses.replace(
        rollout,
        completions=np.where(mask, completions, 0),
        behavior_logprobs=np.where(mask, logprobs, 0),
        completion_mask=mask,
        truncated=truncated,
    )


def assert_same(rollout, expected, rows=slice(None), atol=1e-5):
    """The same completions, bit for bit, and log-probabilities; of some rows of `expected`."""
    for name in ("completions", "completion_mask", "truncated"):
        np.testing.assert_array_equal(getattr(rollout, name), getattr(expected, name)[rows], err_msg=name)
    np.testing.assert_allclose(rollout.behavior_logprobs, expected.behavior_logprobs[rows], atol=atol)


def test_shapes_and_types():
    rollout = sampled()
    assert {name: (x.shape, str(x.dtype)) for name, x in vars(rollout).items()} == {
        "prompts": ((16, PROMPT_LENGTH), "int32"),
        "prompt_mask": ((16, PROMPT_LENGTH), "bool"),
        "completions": ((16, LENGTH), "int32"),
        "completion_mask": ((16, LENGTH), "bool"),
        "behavior_logprobs": ((16, LENGTH), "float32"),
        "truncated": ((16,), "bool"),
    }
    np.testing.assert_array_equal(rollout.prompts, np.repeat(PROMPTS, 2, axis=0))
    np.testing.assert_array_equal(rollout.prompt_mask, np.repeat(MASK, 2, axis=0))


def test_completions_are_various():
    """Sequences of a group, steps of a sequence, and keys draw their own numbers."""
    tokens = np.asarray(sampled().completions)
    assert len({tuple(row) for row in tokens}) == 16
    assert len(np.unique(tokens)) > VOCAB / 2
    other = run(random_params(), jax.random.key(6), PROMPTS, MASK, CONFIG, ON)
    assert np.mean(other.completions != tokens) > 0.5
    uniforms = np.asarray(sequence_uniforms(KEY, jnp.arange(50), Sampling(length=20, group_size=10)))
    assert uniforms.shape == (500, 20)
    assert len(np.unique(uniforms)) > 9980  # of 10,000 out of 2^23
    assert abs(uniforms.mean() - 0.5) < 0.01 and abs(np.corrcoef(uniforms[:, 0], uniforms[:, 1])[0, 1]) < 0.2


def test_ends_may_be_ignored():
    everything = sampled()
    assert np.isin(everything.completions, ON.eos).any()
    assert np.all(everything.completion_mask) and np.all(everything.truncated)


def test_end_of_sequence():
    """Two ends; and one that comes first, one that comes last, and token 0, which padding looks like."""
    everything = sampled()
    tokens = np.asarray(everything.completions)
    first = int(tokens[0, 0])
    last_row = next(row for row in range(16) if not np.isin([0, first, tokens[row, -1]], tokens[row, :-1]).any())
    ends = (0, first, int(tokens[last_row, -1]))
    expected = [cut(everything, eos) for eos in (STOPPING.eos, ends)]
    for eos, rollout in zip((STOPPING.eos, ends), expected, strict=True):
        assert_same(sampled(dataclasses.replace(STOPPING, eos=eos)), rollout)
        assert np.isin(eos, rollout.completions[rollout.completion_mask]).all()
    assert 0 < expected[0].truncated.mean() < 1
    assert expected[1].completion_mask[0].sum() == 1 and not expected[1].truncated[0]
    assert expected[1].completion_mask[last_row].all() and not expected[1].truncated[last_row]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 5}], ids=str)
def test_behavior_logprobs_are_those_of_the_learner(settings):
    sampling = dataclasses.replace(STOPPING, **settings)
    rollout = sampled(sampling)
    logprobs = jax.jit(completion_logprobs, static_argnums=(2, 3))(random_params(), rollout, CONFIG, sampling)
    np.testing.assert_allclose(rollout.behavior_logprobs, logprobs, atol=1e-5)
    np.testing.assert_array_equal(rollout.behavior_logprobs[~rollout.completion_mask], 0)
    assert np.std(logprobs[rollout.completion_mask]) > 0.3


def test_bfloat16_behavior_logprobs_are_close_to_the_learners():
    config = dataclasses.replace(GPT2, dtype="bfloat16")
    sampling = dataclasses.replace(STOPPING, eos=())
    rollout = run(random_params(config), KEY, PROMPTS, MASK, config, sampling)
    logprobs = jax.jit(completion_logprobs, static_argnums=(2, 3))(random_params(config), rollout, config, sampling)
    assert np.all(rollout.truncated)
    assert np.mean(np.abs(rollout.behavior_logprobs - logprobs)) < 0.02


GREEDY_END = 12  # the greedy completions of some prompts come by it


@jax.jit
def next_scores(params, tokens):
    return logits(params, hidden_states(params, tokens, jnp.ones(tokens.shape, bool), GPT2), GPT2)


def test_greedy_decoding_is_repeated_argmax():
    greedy = Sampling(length=LENGTH, temperature=0, eos=(GREEDY_END,))
    rollout = run(random_params(GPT2), KEY, PROMPTS, MASK, GPT2, greedy)
    again = run(random_params(GPT2), jax.random.key(9), PROMPTS, MASK, GPT2, greedy)
    assert_same(again, rollout, atol=0)
    np.testing.assert_array_equal(rollout.behavior_logprobs, 0)
    for prompt, real, completion, mask in zip(PROMPTS, MASK, rollout.completions, rollout.completion_mask, strict=True):
        tokens = list(prompt[real])
        expected = []
        while len(expected) < LENGTH and GREEDY_END not in expected:
            padded = np.array([tokens + [0] * (PROMPT_LENGTH + LENGTH - len(tokens))], np.int32)  # causality hides it
            expected.append(int(np.argmax(next_scores(random_params(GPT2), padded)[0, len(tokens) - 1])))
            tokens.append(expected[-1])
        np.testing.assert_array_equal(completion[mask], expected)
        np.testing.assert_array_equal(completion[~mask], 0)
    assert 0 < np.mean(rollout.truncated) < 1
    assert len(np.unique(rollout.completions)) > 3


def test_a_prompt_gives_the_same_completions_in_any_batch():
    batch = sampled(STOPPING)
    shuffled = np.array([4, 0, 7, 2, 1, 3, 6, 5])
    rollout = run(random_params(), KEY, PROMPTS[shuffled], MASK[shuffled], CONFIG, STOPPING, index=shuffled)
    assert_same(rollout, batch, (2 * shuffled[:, None] + np.arange(2)).reshape(-1))
    longer, mask = np.pad(PROMPTS, ((0, 0), (3, 0)), constant_values=7), np.pad(MASK, ((0, 0), (3, 0)))
    for row in (0, 4, 5):
        alone = run(random_params(), KEY, longer[[row]], mask[[row]], CONFIG, STOPPING, index=np.array([row]))
        assert_same(alone, batch, slice(2 * row, 2 * row + 2))


def test_what_stands_in_the_padding_changes_nothing():
    rollout = run(random_params(), KEY, np.where(MASK, PROMPTS, 9), MASK, CONFIG, STOPPING)
    assert_same(rollout, sampled(STOPPING), atol=0)


def test_repeated_prompts_are_groups_and_a_longer_completion_begins_the_same():
    repeated = [np.repeat(x, 2, axis=0) for x in (PROMPTS, MASK)]
    sampling = dataclasses.replace(STOPPING, group_size=1, length=LENGTH + 4)
    longer = run(random_params(), KEY, *repeated, CONFIG, sampling)
    begun = {k: v[:, :LENGTH] if v.shape[1:] == (LENGTH + 4,) else v for k, v in vars(longer).items()}
    begun["truncated"] = ~np.any(begun["completion_mask"] & np.isin(begun["completions"], STOPPING.eos), axis=1)
    assert_same(dataclasses.replace(longer, **begun), sampled(STOPPING))
    assert longer.completion_mask[:, LENGTH:].any()


def test_without_jit():
    eager = generate(random_params(), KEY, PROMPTS[:1], MASK[:1], CONFIG, dataclasses.replace(STOPPING, length=2))
    np.testing.assert_array_equal(eager.completions, sampled(STOPPING).completions[:2, :2])
    np.testing.assert_allclose(eager.behavior_logprobs, sampled(STOPPING).behavior_logprobs[:2, :2], atol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
def test_devices_change_nothing(devices):
    mesh = make_mesh(jax.devices()[:devices])
    fn = pmapped(lambda *args: generate(*args, CONFIG, STOPPING), mesh, (None, None, 0, 0), 0)
    rollout = fn(random_params(), KEY, PROMPTS, MASK)
    assert_same(rollout, sampled(STOPPING))
    assert [x.data.shape for x in rollout.completions.addressable_shards] == [(16 // devices, LENGTH)] * devices


def test_literal_pmap_gives_the_same_completions():
    def shard(params, key, prompts, mask, index):
        return generate(params, key, prompts, mask, CONFIG, STOPPING, index)

    shards = [x.reshape(8, 1, *x.shape[1:]) for x in (PROMPTS, MASK, np.arange(8))]
    rollout = jax.pmap(shard, in_axes=(None, None, 0, 0, 0))(random_params(), KEY, *shards)
    assert_same(jax.tree.map(lambda x: x.reshape(16, *x.shape[2:]), rollout), sampled(STOPPING))


def test_vmap_over_policies():
    many = [random_params(seed=seed) for seed in (1, 2)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *many)
    keys = jnp.stack([KEY, jax.random.key(6)])
    mapped = jax.jit(jax.vmap(lambda params, key: generate(params, key, PROMPTS, MASK, CONFIG, STOPPING)))(
        stacked, keys
    )
    for seed, (params, key) in enumerate(zip(many, keys, strict=True)):
        alone = run(params, key, PROMPTS, MASK, CONFIG, STOPPING)
        assert_same(jax.tree.map(lambda x, seed=seed: x[seed], mapped), alone)
    assert np.any(mapped.completions[0] != mapped.completions[1])


def test_the_loop_stops_when_all_have_ended(monkeypatch):
    steps = []

    def counted(params, cache, tokens, index, config):
        jax.debug.callback(lambda index: steps.append(int(index)), index)
        return decode_step(params, cache, tokens, index, config)

    decode_step = rollout_module.decode_step
    monkeypatch.setattr(rollout_module, "decode_step", counted)
    one = jax.jit(lambda key: generate(random_params(), key, PROMPTS[:1], MASK[:1], CONFIG, STOPPING))
    lengths = set()
    for seed in range(30):
        steps.clear()
        rollout = one(jax.random.key(seed))
        jax.effects_barrier()
        length = int(rollout.completion_mask.sum(axis=1).max())
        assert sorted(steps) == [PROMPT_LENGTH + step for step in range(length - 1)]  # prefill gives the first token
        lengths.add(length)
    assert {1, LENGTH} < lengths


def test_what_does_not_fit_the_context():
    check_lengths(CONTEXT - LENGTH, ON, CONFIG)
    message = f"prompt of 26 tokens and a completion of {LENGTH} need a context of 33; the model's is 32"
    with pytest.raises(InputError, match=message):
        check_lengths(CONTEXT - LENGTH + 1, ON, CONFIG)
    with pytest.raises(InputError, match=message):
        generate({}, KEY, np.zeros((1, 26), np.int32), np.ones((1, 26), bool), CONFIG, ON)
