"""Measures of texts against hand counts; prompts, rewards, rows and the judge by likelihood of recipes that write."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.compare import Comparing
from experiments.complete import Sampled
from experiments.recipes import writing
from experiments.recipes import writing_parts as parts
from experiments.recipes.writing import Task, Turn, Written
from experiments.reinforcing import Reinforcing
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.config import TransformerConfig
from rl_jax.models.huggingface import Policy
from rl_jax.models.transformer import hidden_states, init_params, logits
from rl_jax.rewards.text import score_text
from rl_jax.types import Rollout

TURNS = [Turn(f"what is {name}?", f"{name} is {name}") for name in ("a cat", "the sea", "rain", "a dog", "an old tree")]


@pytest.fixture(scope="module")
def policy():
    tokenizer = train_tokenizer([f"{turn.prompt} {turn.next}" for turn in TURNS] * 2, 270)
    config = TransformerConfig(
        vocab_size=270, context=64, layers=1, width=16, heads=2, kv_heads=2, head_size=8, mlp_width=32
    )
    return Policy(init_params(jax.random.key(0), config), config, tokenizer)


def test_words_and_sentences_of_a_text():
    assert parts.words_of("Don’t say it's 3 o'clock — NOW!") == ["don’t", "say", "it's", "o'clock", "now"]
    text = 'He said: "Stop." Then he left... Why? … So it'
    assert parts.sentences_of(text) == ['He said: "Stop."', "Then he left...", "Why?", "So it"]
    assert parts.sentences_of("") == parts.sentences_of("...") == []
    assert [parts.is_finished(x) for x in ("So.", 'So?" ', "So!)", "So", "So, ", "")] == [True] * 3 + [False] * 3
    assert [parts.asks(x) for x in ("Is it? Yes.", 'He said "so?"', "So.", "?", "Well ?")] == [
        True,
        True,
        False,
        False,
        True,
    ]


def test_repeated_and_copied_shares_are_of_pairs_of_words():
    words = list("ababac")  # ab ba ab ba ac
    assert parts.repeated_share(words) == pytest.approx(2 / 5)
    assert parts.copied_share(words, list("xbac")) == pytest.approx(3 / 5)
    assert parts.repeated_share(words, 3) == pytest.approx(1 / 4)  # aba bab aba bac
    assert parts.repeated_share(["a"]) == parts.copied_share(["a"], ["a"]) == 0


def test_a_window_is_flat_inside_and_falls_to_nothing():
    found = [parts.within(value, 2, 4, 2) for value in (-1, 0, 1, 2, 3, 4, 5, 5.5, 6, 9)]
    assert found == [0, 0, 0.5, 1, 1, 1, 0.5, 0.25, 0, 0]


def test_rarity_is_scaled_over_the_words_that_more_than_one_text_has():
    rarity = parts.word_rarity(["the cat", "the the dog", "The cow, the cat", "the cow cow"])
    assert rarity == {"the": 0.0, "cat": 1.0, "cow": 1.0}
    rarity = parts.word_rarity(["a b", "a b", "a c", "a b c", "a", "a", "a", "a"])  # idf 0, log 8/3, log 4
    assert rarity == {"a": 0, "b": pytest.approx(np.log(8 / 3) / np.log(4)), "c": 1}
    assert parts.specificity(["a", "c", "unknown", "c"], rarity) == 0.5
    assert parts.specificity([], rarity) == 0 and parts.word_rarity([]) == {}


def test_prompts_are_split_and_bring_their_turns(policy):
    settings = Reinforcing(prompts=1, prompt_length=24, compare=Comparing(prompts=2))
    long = Turn("what is " + "a very " * 20 + "long one?", "no")
    again = Turn(TURNS[0].prompt, "something else")
    prompts = writing.make_prompts(settings, policy.tokenizer, [*TURNS, long, again], "Q: {} A:".format)
    train, held_out = (writing.turns_of(prompts, *part) for part in (prompts.train, prompts.held_out))
    assert held_out == [TURNS[0], TURNS[2]] and train == [TURNS[1], TURNS[3], TURNS[4]]
    assert prompts.train[0].shape == prompts.train[1].shape == (3, 24)
    row = prompts.train[0][1][prompts.train[1][1]]
    assert policy.tokenizer.decode(row.tolist()) == "Q: what is a dog? A:"
    with pytest.raises(InputError, match=r"5 different prompts .* need 6"):
        writing.make_prompts(dataclasses.replace(settings, prompts=4), policy.tokenizer, TURNS, str)


def letters(turns, texts):
    """Two parts that are easily counted."""
    shared = [float(len(set(turn.prompt) & set(text))) for turn, text in zip(turns, texts, strict=True)]
    return {"shared": np.array(shared), "long": np.array([float(len(text)) for text in texts])}


def test_a_reward_is_the_weighted_sum_of_its_parts(policy):
    settings = Reinforcing(prompts=1, prompt_length=24, compare=Comparing(prompts=2))
    task = Task(writing.make_prompts(settings, policy.tokenizer, TURNS, str), letters, letters)
    reward = writing.make_writing_reward(task, {"shared": 2.0, "long": 0.5})
    assert score_text(reward.on_text, "seen by nobody", "cat", Turn("a cat", "")._asdict()) == 2 * 3 + 0.5 * 3
    assert reward.name == "2 shared + 0.5 long" and reward.rows is task.prompts.rows
    assert writing.make_writing_reward(task, {"long": 1}).on_text("", "cat", TURNS[0]._asdict()) == 3


def test_the_policy_before_says_how_well_a_completion_fits(policy):
    draw = np.random.default_rng(0)
    tokens, mask = draw.integers(1, 270, (8, 9)), np.ones((8, 9), bool)
    mask[::2, :2] = False  # prompts
    mask[1::2, 7:] = False  # completions
    other = np.roll(tokens[:, :5], 1, axis=0)
    rollout = Rollout(tokens[:, :5], mask[:, :5], tokens[:, 5:], mask[:, 5:], np.zeros((8, 4)), np.zeros(8, bool))
    found = writing.make_fit(policy)(np.arange(8), (rollout, other, np.roll(mask[:, :5], 1, axis=0)))

    def nats(row, prompt, there):
        ids = jnp.asarray([[*prompt[there], *tokens[row, 5:][mask[row, 5:]]]])
        logprobs = jax.nn.log_softmax(
            logits(policy.params, hidden_states(policy.params, ids, ids >= 0, policy.config), policy.config)[0]
        )
        first = there.sum()
        return np.array([logprobs[place - 1, ids[0, place]] for place in range(first, ids.shape[1])]).mean()

    for row in range(8):
        own = nats(row, tokens[row, :5], mask[row, :5])
        others = nats(row, other[row], np.roll(mask[:, :5], 1, axis=0)[row])
        assert found[writing.NATS][row] == pytest.approx(-own, abs=1e-4)
        assert found[writing.FIT][row] == pytest.approx(own - others, abs=1e-4)


def written(kl, **values):
    """Two prompts with two completions of each, of four tokens, the last of them missing from the first."""
    tokens, mask = np.arange(16).reshape(4, 4) % 5, np.ones((4, 4), bool)
    mask[0, 3] = False
    rollout = Rollout(tokens, mask, tokens, mask, np.zeros((4, 4)), np.array([True, False, False, False]))
    sampled = Sampled(rollout, list("abcd"), {}, np.full((2, 2), kl), None)
    judged = {writing.FIT: np.array(values.pop("fit"), float), writing.NATS: np.zeros((2, 2))}
    return Written(sampled, {name: np.array(x, float) for name, x in values.items()}, judged)


def test_rows_compare_every_policy_with_the_one_before():
    before = written(0.0, fit=[[0, 0], [1, 1]], good=[[0, 1], [2, 3]], other=[[0, 0], [4, 4]])
    after = written(3.0, fit=[[1, 1], [1, 2]], good=[[1, 1], [0, 9]], other=[[1, 1], [1, 1]])
    first, second = writing.policy_rows({writing.BEFORE: before, "after": after}, {"good": 2.0})
    assert "wins by the reward" not in first and first["KL, nats"] is None
    assert second["wins by the reward"].value == pytest.approx((0.75 + 0.5) / 2)
    assert second["wins by fit, nats"].value == pytest.approx((1 + 0.75) / 2)
    assert f"wins by {writing.NATS}" not in second
    assert (first["reward"].value, second["reward"].value) == (3.0, 5.5)
    assert (second["other"].value, second["KL, nats"].value, second["tokens"], second["truncated"]) == (
        1,
        3,
        3.75,
        0.25,
    )
    table = writing.by_measure([first, second])
    assert table[0] == {"measure": "wins by the reward", "before": None, "after": second["wins by the reward"]}
    assert [row["before"] for row in table if row["measure"] == "reward"] == [first["reward"]]
    assert first["distinct-2"] == pytest.approx(5 / 11)  # 01 12 | 40 01 12 | 34 40 01 | 23 34 40


def test_examples_show_the_first_completion_of_each_prompt(tmp_path, policy):
    settings = Reinforcing(prompts=1, prompt_length=24, compare=Comparing(prompts=2))
    task = Task(writing.make_prompts(settings, policy.tokenizer, TURNS, str), letters, letters)
    before = written(0.0, fit=[[0, 0]] * 2, good=[[0, 1], [2, 3]])
    writing.write_examples(tmp_path / "examples.md", task, {"before": before}, {"good": 2.0})
    text = (tmp_path / "examples.md").read_text()
    assert "## what is a cat?\n\n- a person: a cat is a cat\n- before (0.00): a\n" in text
    assert "## what is rain?\n\n- a person: rain is rain\n- before (4.00): c\n" in text
