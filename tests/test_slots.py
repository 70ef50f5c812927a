import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax import slots as slots_module
from rl_jax.errors import InputError
from rl_jax.models import ring as ring_module
from rl_jax.models.config import TransformerConfig, gpt2, llama
from rl_jax.models.transformer import init_params
from rl_jax.rollout import generate
from rl_jax.sampling import Sampling
from rl_jax.slots import generate_in_slots

VOCAB, CONTEXT, PROMPT_LENGTH, LENGTH = 23, 80, 5, 9
LLAMA = llama(VOCAB, CONTEXT, 2, 16, 4, kv_heads=2, mlp_width=32)
SHALLOW = dataclasses.replace(LLAMA, layers=1)
GPT2 = gpt2(VOCAB, CONTEXT, 2, 16, 2)
RNG = np.random.default_rng(0)
PROMPTS = RNG.integers(VOCAB, size=(8, PROMPT_LENGTH)).astype(np.int32)
MASK = np.arange(PROMPT_LENGTH) >= np.array([0, 1, 2, 3, 4, 0, 2, 1])[:, None]
MANY = RNG.integers(VOCAB, size=(40, PROMPT_LENGTH)).astype(np.int32)
MANY_MASK = np.arange(PROMPT_LENGTH) >= RNG.integers(PROMPT_LENGTH, size=40)[:, None]
KEY = jax.random.key(5)
STOPPING = Sampling(length=LENGTH, group_size=2, eos=(3, 8, 11))
ON = dataclasses.replace(STOPPING, ignore_eos=True)
LONG = Sampling(length=70, group_size=2, temperature=0.9, top_k=15, top_p=0.95, eos=(3,))
GREEDY = Sampling(length=LENGTH, temperature=0.0, eos=(0, 16, 20))
FALLING = Sampling(length=60, group_size=2, eos=(3, 8, 11))

run = jax.jit(generate_in_slots, static_argnames=("config", "sampling", "slots"))
plain = jax.jit(generate, static_argnames=("config", "sampling"))


@functools.cache
def random_params(config: TransformerConfig, seed: int = 1):
    """Parameters large enough for uneven distributions, none of them left at 0 or 1."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    rng = np.random.default_rng(seed)

    def fill(path, shape):
        return rng.normal(path[-1].key == "scale", 0.2, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.cache
def padded(config: TransformerConfig, sampling: Sampling, many: bool = False):
    prompts, mask = (MANY, MANY_MASK) if many else (PROMPTS, MASK)
    return jax.device_get(plain(random_params(config), KEY, prompts, mask, config, sampling))


def assert_same(rollout, expected, rows=slice(None), atol=1e-5):
    """The same completions, bit for bit, and log-probabilities; of some rows of `expected`."""
    for name in ("prompts", "prompt_mask", "completions", "completion_mask", "truncated"):
        got, wanted = getattr(rollout, name), getattr(expected, name)[rows]
        assert got.dtype == wanted.dtype, name
        np.testing.assert_array_equal(got, wanted, err_msg=name)
    np.testing.assert_allclose(rollout.behavior_logprobs, expected.behavior_logprobs[rows], atol=atol)
    np.testing.assert_array_equal(rollout.behavior_logprobs[~expected.completion_mask[rows]], 0)


def lengths_of(rollout):
    return np.sum(rollout.completion_mask, axis=1)


@functools.cache
def stopped():
    """What is sampled with STOPPING, from what the padded rollout samples when it ignores the ends."""
    everything = padded(GPT2, ON)
    ends = np.isin(everything.completions, STOPPING.eos)
    mask = np.cumsum(ends, axis=1) - ends == 0
    return dataclasses.replace(
        everything,
        completions=np.where(mask, everything.completions, 0),
        completion_mask=mask,
        behavior_logprobs=np.where(mask, everything.behavior_logprobs, 0),
        truncated=~np.any(ends, axis=1),
    )


@pytest.mark.parametrize("slots", [0, 1, 3, 99])
def test_any_number_of_slots_samples_what_the_padded_rollout_does(slots):
    expected, index = stopped(), np.arange(8) if slots == 3 else None
    assert_same(run(random_params(GPT2), KEY, PROMPTS, MASK, GPT2, STOPPING, index=index, slots=slots), expected)
    assert {1, LENGTH} < set(lengths_of(expected)) and 0 < np.mean(expected.truncated) < 1
    assert len(np.unique(expected.completions)) > VOCAB / 2


def test_other_prompts_of_the_same_batch():
    """Their index says which they are: in another order, some of them twice and some not at all."""
    index = np.array([6, 1, 3, 6, 0, 0, 7, 2])
    rollout = run(random_params(GPT2), KEY, PROMPTS[index], MASK[index], GPT2, STOPPING, index=index, slots=3)
    assert_same(rollout, stopped(), (2 * index[:, None] + np.arange(2)).reshape(-1))


def test_greedy_decoding():
    expected = padded(LLAMA, GREEDY)
    assert_same(run(random_params(LLAMA), KEY, PROMPTS, MASK, LLAMA, GREEDY, slots=3), expected)
    assert len(set(lengths_of(expected))) > 3 and not np.any(expected.behavior_logprobs)


@pytest.mark.parametrize(("branch", "width", "slots"), [("cpu", 32, 3), ("default", 8, 5)])
def test_rings_of_several_blocks_that_wrap(monkeypatch, branch, width, slots):
    """As on a CPU, and as on a GPU, which looks at all blocks."""
    assert ring_module.BLOCK == 32
    monkeypatch.setattr(ring_module, "BLOCK", width)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda **branches: branches[branch]())
    expected = padded(SHALLOW, LONG)
    lengths, columns = lengths_of(expected), -(-LONG.length // width) * width
    assert sum(lengths - 1) / slots > columns > 2 * width and max(lengths) == LONG.length and len(set(lengths)) > 8
    here = jax.jit(functools.partial(generate_in_slots, config=SHALLOW, sampling=LONG, slots=slots))
    assert_same(here(random_params(SHALLOW), KEY, PROMPTS, MASK), expected)


def schedule(lengths, sizes):
    """Steps at each size of the batch: the queue in order, a slot taking the next sequence as soon as it is free.

    A sequence is as many steps of a slot as it has tokens but one, since reading the prompt gives the first. The batch
    goes on at the next of the sizes once the queue is empty and no more than that many are at work.
    """
    waiting, working, steps = [length - 1 for length in lengths], [], []
    for size, enough in zip(sizes, [*sizes[1:], 0], strict=True):
        steps.append(0)
        while True:
            while waiting and len(working) < size:
                first = waiting.pop(0)
                working += [first] if first else []
            if not waiting and len(working) <= enough:
                break
            steps[-1] += 1
            working = [left - 1 for left in working if left > 1]
    return steps


@pytest.fixture
def steps(monkeypatch):
    """The steps of the ring as they are made: the step's number and the ages of its slots."""
    made = []

    def counted(params, ring, tokens, step, ages, config):
        jax.debug.callback(lambda step, ages: made.append((int(step), ages.tolist())), step, ages)
        return ring_module.ring_step(params, ring, tokens, step, ages, config)

    monkeypatch.setattr(slots_module, "ring_step", counted)
    return made


def test_a_batch_that_shrinks(monkeypatch, steps):
    """It samples the same, and takes the steps that it should, at each size: slots move, and their logs with them."""
    monkeypatch.setattr(slots_module, "SHRINK", 4)
    monkeypatch.setattr(slots_module, "FEWEST", 2)
    sizes = [40, 10, 2]
    expected = padded(SHALLOW, FALLING, many=True)
    here = jax.jit(functools.partial(generate_in_slots, config=SHALLOW, sampling=FALLING, slots=40))
    assert_same(here(random_params(SHALLOW), KEY, MANY, MANY_MASK), expected)
    jax.effects_barrier()
    wanted = schedule(lengths_of(expected), sizes)
    assert min(wanted) > 0
    assert [sum(len(ages) == size for _, ages in steps) for size in sizes] == wanted
    assert sorted(step for step, _ in steps) == list(range(sum(wanted)))
    assert sum(len(ages) for _, ages in steps) < 0.8 * len(expected.completions) * (max(lengths_of(expected)) - 1)


@pytest.mark.parametrize(
    ("lengths", "slots", "ends", "wanted"),
    [
        ([3, 1, 5, 2, 2], 2, True, [[1, 1], [2, 2], [1, 3], [1, 4]]),  # the third begins where the second is all of it
        ([3, 1, 5, 2, 2], 3, True, [[1, 1, 1], [2, 1, 2], [0, 0, 3], [0, 0, 4]]),
        ([3, 1, 5, 2, 2], 0, True, [[1, 0, 1, 1, 1], [2, 0, 2, 0, 0], [0, 0, 3, 0, 0], [0, 0, 4, 0, 0]]),
        ([1, 1, 1, 1, 1], 2, True, []),
        ([1, 2, 2, 5, 3], 3, False, [[1] * 3, [2] * 3, [3] * 3, [4] * 3, *[[n, n, 0] for n in (1, 2, 3, 4)]]),
    ],
)
def test_the_schedule_by_hand(monkeypatch, steps, lengths, slots, ends, wanted):
    """Ages of the slots at each step, where it is known which token of a completion ends it, or would."""
    ended = jnp.arange(5)[None, :] == jnp.array(lengths)[:, None] - 1
    script = jnp.where(ended, 3.0, 10.0 * jnp.arange(5)[:, None] + jnp.arange(100, 105)[None, :])
    monkeypatch.setattr(slots_module, "sequence_uniforms", lambda *_: script)
    monkeypatch.setattr(slots_module, "sample_tokens", lambda scores, said, _: (said.astype(jnp.int32), -said))
    sampling = Sampling(5, eos=(3,), ignore_eos=not ends)
    here = jax.jit(functools.partial(generate_in_slots, config=SHALLOW, sampling=sampling, slots=slots))
    rollout = here(random_params(SHALLOW), KEY, PROMPTS[:5], MASK[:5])
    jax.effects_barrier()
    assert [ages for _, ages in sorted(steps)] == wanted
    mask = np.arange(5)[None, :] < np.array(lengths)[:, None] if ends else np.ones((5, 5), bool)
    np.testing.assert_array_equal(rollout.completion_mask, mask)
    np.testing.assert_array_equal(rollout.completions, np.where(mask, script, 0))
    np.testing.assert_array_equal(rollout.behavior_logprobs, np.where(mask, -script, 0))
    np.testing.assert_array_equal(rollout.truncated, not ends)


def test_completions_of_one_token():
    sampling = dataclasses.replace(STOPPING, length=1)
    first = jax.tree.map(lambda x: x[:, :1] if x.shape[1:] == (LENGTH,) else x, stopped())
    expected = dataclasses.replace(first, truncated=~np.isin(first.completions[:, 0], STOPPING.eos))
    assert_same(run(random_params(GPT2), KEY, PROMPTS, MASK, GPT2, sampling, slots=3), expected)
    assert 0 < np.mean(expected.truncated) < 1


def test_bfloat16():
    config = dataclasses.replace(SHALLOW, dtype="bfloat16")
    rollout = jax.device_get(run(random_params(config), KEY, PROMPTS, MASK, config, STOPPING, slots=3))
    lengths = lengths_of(rollout)
    np.testing.assert_array_equal(rollout.completion_mask, np.arange(LENGTH) < lengths[:, None])
    last = np.take_along_axis(np.asarray(rollout.completions), lengths[:, None] - 1, axis=1)[:, 0]
    np.testing.assert_array_equal(rollout.truncated, ~np.isin(last, STOPPING.eos))
    assert np.all(lengths[rollout.truncated] == LENGTH) and 0 < np.mean(rollout.truncated) < 1
    assert np.sum(np.isin(rollout.completions, STOPPING.eos)) == np.sum(~rollout.truncated)


def test_what_does_not_fit_the_context():
    sampling = dataclasses.replace(STOPPING, length=CONTEXT - PROMPT_LENGTH + 1)
    with pytest.raises(InputError, match="need a context of 81; the model's is 80"):
        generate_in_slots({}, KEY, PROMPTS, MASK, GPT2, sampling)
