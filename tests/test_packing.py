import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.models.config import gpt2, llama
from rl_jax.models.transformer import add_value_head, init_params
from rl_jax.packing import Packing, choose_packing, from_rows, pack, sum_over_rows, to_rows
from rl_jax.reinforce.gradient import Scores, reinforce_gradient
from rl_jax.reinforce.objectives import (
    dual_clip_loss,
    ppo_clip_loss,
    reinforce_loss,
    sequence_clip_loss,
    sequence_importance_loss,
    token_importance_loss,
)
from rl_jax.sampling import Sampling
from rl_jax.scoring import Reference, completion_states, make_score_fn, reference_scores, score_completions
from rl_jax.types import Rollout

VOCAB, PROMPT_LENGTH, LENGTH = 21, 4, 6
LEAST = PROMPT_LENGTH - 1 + LENGTH  # columns that hold any sequence
COUNT = 13  # rows that hold any 12 of them, and one more
CONFIGS = {
    "learned": gpt2(VOCAB, 12, 2, 16, 2),
    "rotary": llama(VOCAB, 12, 1, 16, 4, kv_heads=2, mlp_width=32, tied=False),
}
SAMPLING = Sampling(LENGTH, temperature=0.8, top_k=15)


def make_rollout(prompts, lengths, seed=0):
    """Completions of so many tokens of the prompts with these numbers, of 4, 2, 1 and 3 tokens; padding is garbage."""
    rng = np.random.default_rng(seed)
    texts = rng.integers(VOCAB, size=(4, PROMPT_LENGTH)).astype(np.int32)
    texts[1] = texts[0]  # which the mask alone tells apart
    masks = np.arange(PROMPT_LENGTH)[None, :] >= np.array([0, 2, 3, 1])[:, None]
    mask = np.arange(LENGTH)[None, :] < np.array(lengths)[:, None]
    return Rollout(
        prompts=jnp.asarray(texts[prompts]),
        prompt_mask=jnp.asarray(masks[prompts]),
        completions=jnp.asarray(rng.integers(VOCAB, size=mask.shape), jnp.int32),
        completion_mask=jnp.asarray(mask),
        behavior_logprobs=jnp.asarray(rng.normal(-4.5, 0.5, mask.shape) * mask, jnp.float32),
        truncated=jnp.asarray(mask[:, -1]),
    )


GROUPS = make_rollout([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], [6, 1, 3, 2, 6, 4, 1, 1, 5, 6, 6, 6])
SHUFFLED = make_rollout([0, 1, 2, 3, 0, 2, 1, 3, 1, 0, 2, 0], [2, 6, 1, 3, 6, 6, 5, 1, 4, 2, 6, 1], seed=1)
EMPTIES = make_rollout([1, 1, 0, 1, 3, 3, 3, 3, 2, 2, 2, 1], [0, 3, 0, 2, 4, 0, 5, 1, 1, 0, 2, 0], seed=2)
ROLLOUTS = {"groups": GROUPS, "shuffled": SHUFFLED, "empties": EMPTIES}

packed = jax.jit(pack, static_argnums=1)


def plain_rows(rollout, width):
    """Next fit, by lists: rows of (token, position, sequence, index, run), without a sequence where prompts are shared.

    A run is neighbours with the same prompt, which a row has once, up to its last token.
    """
    rows, run, before, sharing = [], 0, None, None
    for number in range(len(rollout.prompts)):
        prompt = [int(token) for token in np.asarray(rollout.prompts)[number][np.asarray(rollout.prompt_mask)[number]]]
        run, before = run + (before is not None and prompt != before), prompt
        completion = np.asarray(rollout.completions)[number][np.asarray(rollout.completion_mask)[number]].tolist()
        if not completion:
            continue
        shared = [(token, position, None, None, run) for position, token in enumerate(prompt[:-1])]
        read = [prompt[-1], *completion[:-1]]
        own = [(token, len(shared) + index, number, index, run) for index, token in enumerate(read)]
        room = width - len(rows[-1]) if rows else -1
        if run == sharing and len(own) <= room:
            rows[-1] += own
        elif run != sharing and len(shared) + len(own) <= room:
            rows[-1] += shared + own
        else:
            rows.append(shared + own)
        sharing = run
    return rows


@pytest.mark.parametrize("width", [LEAST, LEAST + 4, 26, 80])
@pytest.mark.parametrize("rollout", ROLLOUTS.values(), ids=ROLLOUTS)
def test_rows_are_those_of_a_plain_packer(rollout, width):
    plain = plain_rows(rollout, width)
    rows = jax.device_get(packed(rollout, Packing(COUNT, width)))
    assert len(plain) < COUNT and rows.seen.shape == (COUNT, width, width) and max(map(len, plain)) <= width
    cells = np.full(rollout.completions.shape, -1)
    for number, row in enumerate(plain + [[]] * (COUNT - len(plain))):
        used = len(row)
        for column, (token, position, sequence, index, run) in enumerate(row):
            assert (rows.tokens[number, column], rows.positions[number, column]) == (token, position)
            assert rows.predicts[number, column] == (sequence is not None)
            if sequence is not None:
                assert (rows.sequence[number, column], rows.index[number, column]) == (sequence, index)
                cells[sequence, index] = number * width + column
            sees = [r == run and s in (None, sequence) and p <= position for _, p, s, _, r in row]
            np.testing.assert_array_equal(rows.seen[number, column, :used], sees)
            assert sum(sees) == position + 1  # nothing twice, nothing missing
        assert not np.any(rows.predicts[number, used:]) and not np.any(rows.seen[number, :used, used:])
        assert not np.any(rows.tokens[number, used:])
    mask = np.asarray(rollout.completion_mask)
    np.testing.assert_array_equal(rows.cells[mask], cells[mask])
    assert rows.cells.min() >= 0 and rows.cells.max() < rows.tokens.size


def test_rows_by_hand():
    """Two completions of one prompt in a row of exactly their width, and one of another, which begins the next."""
    rollout = make_rollout([0, 0, 1], [2, 3, 1])
    (a, b, c, d), (_, _, e, f) = np.asarray(rollout.prompts)[[0, 2]]
    (u, _), (v, w, _) = np.asarray(rollout.completions)[0, :2], np.asarray(rollout.completions)[1, :3]
    rows = jax.device_get(packed(rollout, Packing(2, 9)))
    np.testing.assert_array_equal(rows.tokens, [[a, b, c, d, u, d, v, w, 0], [e, f, 0, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 3, 4, 3, 4, 5, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.predicts[0], [False] * 3 + [True] * 5 + [False])
    np.testing.assert_array_equal(rows.predicts[1], [False, True] + [False] * 7)
    np.testing.assert_array_equal(np.flatnonzero(rows.seen[0, 4]), [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(np.flatnonzero(rows.seen[0, 6]), [0, 1, 2, 5, 6])
    assert rows.cells[0, :2].tolist() == [3, 4] and rows.cells[1, :3].tolist() == [5, 6, 7] and rows.cells[2, 0] == 10


@pytest.mark.parametrize("trailing", [(), (2,)])
def test_to_rows_and_back(trailing):
    rng = np.random.default_rng(3)
    for rollout in ROLLOUTS.values():
        rows, mask = packed(rollout, Packing(COUNT, LEAST)), np.asarray(rollout.completion_mask)
        values = rng.normal(size=(*mask.shape, *trailing)).astype(np.float32)
        there = np.asarray(to_rows(jnp.asarray(values), rows))
        assert there.shape == (COUNT, LEAST, *trailing)
        np.testing.assert_array_equal(there[~np.asarray(rows.predicts)], 0)
        back = np.asarray(from_rows(jnp.asarray(there + 1), rows, jnp.asarray(mask)))
        np.testing.assert_array_equal(back[mask], values[mask] + 1)
        np.testing.assert_array_equal(back[~mask], 0)
        np.testing.assert_array_equal(np.sort(there[there != 0]), np.sort(values[mask].reshape(-1)))


@pytest.mark.parametrize("trailing", [(), (2,)])
def test_gradient_of_from_rows_is_that_of_indexing(trailing):
    @jax.jit
    def slopes(values, wanted, rows, mask):
        def indexed(values):
            wide = mask.reshape(*mask.shape, *[1] * len(trailing))
            return jnp.where(wide, values.reshape(-1, *trailing)[rows.cells], 0.0)

        def unpacked(values):
            return from_rows(values, rows, mask)

        def slope(fn):
            return jax.value_and_grad(lambda values: jnp.sum(jnp.square(fn(values) - wanted)))(values)

        return slope(unpacked), slope(indexed)

    rng = np.random.default_rng(4)
    for rollout in ROLLOUTS.values():
        rows, mask = packed(rollout, Packing(COUNT, LEAST)), rollout.completion_mask
        values, wanted = (
            rng.normal(size=(*shape, *trailing)).astype(np.float32) for shape in ((COUNT, LEAST), mask.shape)
        )
        (error, slope), (expected_error, expected) = slopes(values, wanted, rows, mask)
        np.testing.assert_allclose(error, expected_error, rtol=1e-6)
        np.testing.assert_allclose(slope, expected, rtol=1e-6)
        assert np.sum(np.asarray(expected) != 0) == np.sum(mask) * np.prod(trailing, dtype=int)


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_parts_are_so_many_rows(rows):
    """Each sequence counts in one part, that of its row, and what the others make of it counts for nothing."""
    packing = Packing(rows, LEAST + 4)

    @jax.jit
    def parts(batch):
        def make(part):
            numbers, part = part
            own = jnp.any(part.completion_mask, axis=1)
            columns = jnp.sum(pack(part, packing).predicts)
            sums = {"parts": 1, "tokens": jnp.sum(part.completion_mask, axis=1), "columns": columns}
            first = jnp.broadcast_to(jnp.min(jnp.where(own, numbers, 99)), 12)
            return sums, (jnp.where(own, numbers, -1), first)

        return sum_over_rows(make, batch, packing)

    for rollout in ROLLOUTS.values():
        plain, mask = plain_rows(rollout, packing.width), np.asarray(rollout.completion_mask)
        part_of = {cell[2]: number // rows for number, row in enumerate(plain) for cell in row if cell[2] is not None}
        sums, (numbers, firsts) = jax.device_get(parts((jnp.arange(12), rollout)))
        assert sums["parts"] == -(-len(plain) // rows) and sums["columns"] == np.sum(mask)
        np.testing.assert_array_equal(sums["tokens"], np.sum(mask, axis=1))
        assert set(part_of) == set(np.flatnonzero(mask[:, 0]))
        for sequence, part in part_of.items():
            assert numbers[sequence] == sequence
            assert firsts[sequence] == min(other for other in part_of if part_of[other] == part)


@functools.cache
def params_of(name, seed):
    """Parameters large enough for uneven distributions, those of a critic among them."""
    shapes = jax.eval_shape(lambda: add_value_head(init_params(jax.random.key(0), CONFIGS[name]), CONFIGS[name]))
    rng = np.random.default_rng(seed)

    def fill(path, shape):
        return rng.normal(path[-1].key == "scale", 0.2, shape.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.partial(jax.jit, static_argnames=("config", "packing"))
def both_scores(params, ref_params, rollout, config, packing):
    """Padded and packed: those of the reference, and of the policy beside it."""
    padded_logprobs, states = reference_scores(ref_params, rollout, config, SAMPLING)
    packed = reference_scores(ref_params, rollout, config, SAMPLING, packing)
    reference, enough = Reference(ref_params, states), Packing(12, packing.width)
    return (
        (padded_logprobs, jnp.where(rollout.completion_mask[..., None], states, 0.0)),
        packed,
        score_completions(params, rollout, config, SAMPLING, reference),
        score_completions(params, rollout, config, SAMPLING, reference, enough),
    )


@pytest.mark.parametrize(
    ("name", "packing"), [("learned", Packing(1, LEAST)), ("rotary", Packing(2, 26))], ids=["learned", "rotary"]
)
def test_scores_are_those_of_padded_sequences(name, packing):
    for rollout in ROLLOUTS.values():
        arguments = params_of(name, 1), params_of(name, 2), rollout
        ref, packed_ref, scores, packed = both_scores(*arguments, CONFIGS[name], packing)
        for got, wanted in zip(packed_ref + packed, ref + scores, strict=True):
            assert got.dtype == wanted.dtype
            np.testing.assert_allclose(got, wanted, atol=1e-5)
            assert np.std(wanted[rollout.completion_mask]) > 0.03


def weigh(scores, context):
    """A divergence, an entropy and a critic's error for the loss to hold besides."""
    return 0.3 * scores.kl - 0.1 * scores.entropy + jnp.square(scores.values - context["targets"])


ADVANTAGES = jnp.asarray(np.random.default_rng(5).normal(size=12), jnp.float32)
TARGETS = jnp.asarray(np.random.default_rng(6).normal(size=(12, LENGTH)), jnp.float32)
CLIPS = {"clip_low": 0.2, "clip_high": 0.3}
LOSSES = {
    "reinforce": reinforce_loss,
    "ppo_clip": functools.partial(ppo_clip_loss, **CLIPS),
    "dual_clip": functools.partial(dual_clip_loss, **CLIPS, dual_clip=1.5),
    "sequence_clip": functools.partial(sequence_clip_loss, **CLIPS),
    "token_importance": functools.partial(token_importance_loss, ratio_cap=1.2),
    "sequence_importance": functools.partial(sequence_importance_loss, ratio_cap=2.0),
}


def assert_same(result, expected):
    """Gradients and metrics. Rounding is as large as the gradient that it adds up to nothing in some arrays."""
    (gradients, metrics), (wanted, wanted_metrics) = jax.device_get((result, expected))
    largest = max(np.abs(array).max() for array in jax.tree.leaves(wanted))
    for array, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-5, atol=1e-5 * largest)
        assert np.any(other != 0)
    assert set(metrics) == set(wanted_metrics)
    for name, metric in metrics.items():
        np.testing.assert_allclose(metric, wanted_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("name", "packing", "loss", "normalize"),
    [
        ("learned", Packing(1, LEAST), "sequence_clip", "sequence"),
        ("rotary", Packing(2, 26), "sequence_importance", "completion"),
    ],
    ids=["sequence_clip-one_row", "sequence_importance-long_rows"],
)
def test_gradient_is_that_of_padded_sequences(name, packing, loss, normalize):
    config, ref_params = CONFIGS[name], params_of(name, 2)

    @jax.jit
    def gradients(params, rollout):
        def gradient(score_fn, **options):
            return reinforce_gradient(
                params,
                rollout,
                ADVANTAGES,
                lambda params, part, context: score_fn(params, part, context["states"]),
                normalize=normalize,
                loss_fn=LOSSES[loss],
                penalty_fn=weigh,
                context={"states": completion_states(ref_params, rollout, config), "targets": TARGETS},
                **options,
            )

        packed = make_score_fn(ref_params, config, SAMPLING, packing)
        in_parts = functools.partial(sum_over_rows, packing=packing)
        return gradient(packed, sum_parts=in_parts), gradient(make_score_fn(ref_params, config, SAMPLING))

    for rollout in ROLLOUTS.values():
        result, expected = gradients(params_of(name, 1), rollout)
        assert_same(result, expected)
        assert 0 < expected[1]["clipped"] < 1 and expected[1]["kl"] > 0.1


FEATURES = jnp.asarray(np.random.default_rng(7).normal(size=(12, LENGTH, 3)), jnp.float32)


def toy_scores(params, rollout, context):
    """Of a policy without tokens. What is not asked for is no number."""
    hidden = jnp.where(rollout.completion_mask, 0.0, jnp.nan)
    logprobs = context["features"] @ params["a"] - 4.5
    return Scores(logprobs, jnp.square(logprobs) + hidden, jnp.abs(logprobs) + hidden, logprobs * params["b"] + hidden)


@pytest.mark.parametrize(
    ("loss", "normalize"),
    [*zip(LOSSES, ["constant", "token", "token", "completion", "sequence", "sequence"], strict=True)],
)
def test_any_loss_is_the_same_in_parts(loss, normalize):
    params = {"a": jnp.array([0.3, -0.2, 0.5]), "b": jnp.array(0.7)}

    @jax.jit
    def gradient(rollout):
        whole = functools.partial(
            reinforce_gradient,
            params,
            rollout,
            ADVANTAGES,
            toy_scores,
            normalize=normalize,
            loss_fn=LOSSES[loss],
            penalty_fn=weigh,
            context={"features": FEATURES, "targets": TARGETS},
        )
        return whole(sum_parts=functools.partial(sum_over_rows, packing=Packing(2, LEAST))), whole()

    for rollout in ROLLOUTS.values():
        assert_same(*gradient(rollout))


def test_nothing_to_pack():
    rollout = dataclasses.replace(GROUPS, completion_mask=jnp.zeros_like(GROUPS.completion_mask))
    assert not np.any(packed(rollout, Packing(COUNT, LEAST)).predicts)

    def make(part):
        return jnp.ones(()), part.completions + 1

    sums, kept = jax.jit(lambda rollout: sum_over_rows(make, rollout, Packing(2, LEAST)))(rollout)
    assert sums == 0 and kept.shape == GROUPS.completions.shape


@pytest.mark.parametrize(
    ("prompt_length", "length", "group_size", "width", "tokens", "expected"),
    [
        # A completion costs (20 / k + 20) (60 + 20 + 20 k): 4000, 3600 and 3733 for k of 1, 2 and 3
        (21, 20, 8, 10, 300, Packing(5, 60)),
        (21, 20, 1, 10, 300, Packing(8, 40)),  # 7.5, of which Python makes 8
        (21, 20, 8, 10, 70, Packing(1, 60)),
        (21, 20, 8, 10, 1, Packing(1, 60)),
        (1, 10, 4, 64, 100, Packing(10, 10)),  # no prompt to share
        # (100 / k + 10) (384 + 100 + 10 k): 12690 for k = 8, and for k = 7 13453
        (101, 10, 8, 64, 1000, Packing(6, 180)),
        # (1023 / k + 64) (4095 + 64 k) is least at k = sqrt(1023 * 4095) / 64 = 31.98: 1023 + 32 * 64 columns
        (1024, 64, 64, 512, 1 << 14, Packing(5, 3071)),
    ],
)
def test_packing_is_the_cheapest(prompt_length, length, group_size, width, tokens, expected):
    assert choose_packing(prompt_length, length, group_size, width, tokens) == expected
