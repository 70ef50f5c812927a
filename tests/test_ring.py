import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.models import ring as ring_module
from rl_jax.models.attention import Focus
from rl_jax.models.ring import Ring, empty_ring, take_prompts, take_slots

PROMPTS, PROMPT_LENGTH, SLOTS, HEADS, KV_HEADS, SIZE, LENGTH = 4, 3, 5, 4, 2, 6, 7
RNG = np.random.default_rng(0)
PAIRS = ((RNG.normal(size=(2, PROMPTS, KV_HEADS, PROMPT_LENGTH, SIZE))).astype(np.float32),)
MASK = np.arange(PROMPT_LENGTH) >= np.array([0, 2, 1, 0])[:, None]
# What each slot does at each step: the tokens of its completion that it has then seen, 0 while it is idle. A completion
# may be as long as LENGTH, one beside it begin at any step, and a slot be idle before it takes another.
AGES = np.array(
    [
        [1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 7, 1, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5],
        [0, 0, 1, 2, 3, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 0],
        [1, 1, 1, 2, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7],
        [0] * 27,
        [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3],
    ]
).T


def choose(branch):
    """In place of `jax.lax.platform_dependent`: one branch, wherever it runs."""
    return lambda **branches: branches[branch]()


def attention(query, keys, values):
    """Of one slot, in float64. [H, K], [J, T, K], [J, T, K] -> [H, K]."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    seen = []
    for head, vector in enumerate(query):
        group = head // (HEADS // KV_HEADS)
        weights = np.exp(keys[group] @ vector / np.sqrt(SIZE))
        seen.append(weights @ values[group] / weights.sum())
    return np.array(seen)


@pytest.mark.parametrize(("branch", "width"), [("cpu", 1), ("cpu", 3), ("cpu", 32), ("default", 3), ("default", 32)])
def test_a_slot_sees_its_prompt_and_its_own_completion(monkeypatch, branch, width):
    """At every step, however the ring has wrapped and whatever the slots beside it do, and after some are dropped."""
    monkeypatch.setattr(ring_module, "BLOCK", width)
    monkeypatch.setattr(jax.lax, "platform_dependent", choose(branch))

    @jax.jit
    def look_back(ring, step, ages, *new):
        return ring_module._look_back(ring.prompts[0], ring.prompt_mask, ring.blocks[0], step, ages, *new, Focus())

    ring = empty_ring(tuple(map(tuple, PAIRS)), SLOTS, LENGTH)
    chosen, kept, past = np.zeros(SLOTS, int), np.arange(SLOTS), [[] for _ in range(SLOTS)]
    rng, compared = np.random.default_rng(1), 0
    for step, ages in enumerate(AGES):
        fresh = ages == 1
        chosen = np.where(fresh, rng.integers(PROMPTS, size=SLOTS), chosen)
        query = rng.normal(size=(SLOTS, 1, HEADS, SIZE)).astype(np.float32)
        key, value = rng.normal(size=(2, SLOTS, KV_HEADS, 1, SIZE)).astype(np.float32)
        if step == 20:
            kept = np.array([4, 2, 0])
            ring = take_slots(ring, kept)
        ring = take_prompts(ring, tuple(map(tuple, PAIRS)), jnp.asarray(MASK), chosen[kept], fresh[kept])
        seen, blocks = look_back(ring, jnp.int32(step), ages[kept], query[kept], key[kept], value[kept])
        ring = ring._replace(blocks=(blocks,))
        for slot in range(SLOTS):
            past[slot] = [*([] if fresh[slot] else past[slot]), (key[slot], value[slot])]
        for place, slot in enumerate(kept):
            if ages[slot] == 0:
                continue
            real, own = MASK[chosen[slot]], past[slot]
            assert len(own) == ages[slot]
            keys, values = (
                np.concatenate([PAIRS[0][n][chosen[slot]][:, real], *(pair[n] for pair in own)], axis=1) for n in (0, 1)
            )
            np.testing.assert_allclose(seen[place, 0], attention(query[slot, 0], keys, values), atol=1e-5)
            compared += 1
    assert compared == np.sum(AGES > 0) - np.sum(AGES[20:, [1, 3]] > 0)
    assert jax.tree.map(jnp.shape, ring.blocks) == (
        ((-(-LENGTH // min(width, LENGTH)), 3, KV_HEADS, min(width, 7), 6),) * 2,
    )


def test_prompts_are_taken_by_fresh_slots_alone():
    pairs = tuple(map(tuple, PAIRS))
    before = take_prompts(empty_ring(pairs, 3, LENGTH), pairs, jnp.asarray(MASK), np.array([3, 1, 0]), np.ones(3, bool))
    after = take_prompts(before, pairs, jnp.asarray(MASK), np.array([2, 2, 2]), np.array([False, True, False]))
    assert isinstance(after, Ring)
    for array, of_prompts in (
        (after.prompt_mask, MASK),
        (after.prompts[0][0], PAIRS[0][0]),
        (after.prompts[0][1], PAIRS[0][1]),
    ):
        np.testing.assert_array_equal(array, of_prompts[[3, 2, 0]])
