"""The recipe that continues passages: its openings and the parts of its reward by hand, and itself in miniature."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from writing_for_tests import SMALL, WORDS, embed_letters, tiny_policy

from experiments.pretrain import Pretraining, held_out_passages
from experiments.recipes import story as recipe
from experiments.recipes import writing
from experiments.recipes.writing import Turn, Writing
from rl_jax.errors import InputError
from rl_jax.rewards.text import sentiment

LONG = "And so the king went down to the sea in the night."  # twelve words


def test_an_opening_is_as_few_sentences_as_have_its_words():
    rest = f"{LONG} He saw a ship."
    assert recipe.opening_and_rest(f"{LONG} {rest}") == Turn(LONG, rest)
    assert recipe.opening_and_rest(f"He went. {LONG} {rest}") == Turn(f"He went. {LONG}", rest)
    assert recipe.opening_and_rest(f"{LONG} {LONG}") is None  # too little follows
    assert recipe.opening_and_rest(" ".join([LONG[:-1]] * 4) + f". {rest}") is None  # too long an opening
    assert recipe.opening_and_rest(LONG) is recipe.opening_and_rest("") is None


def test_sentences_hang_together_where_they_are_near_and_not_the_same():
    vectors = {"A b.": [1, 0], "C d.": [0.5, 0.75**0.5], "E f.": [0, 1], "A b": [1, 0]}

    def embed(texts):
        return np.array([vectors[text] for text in texts], np.float32)

    # Cosines 0.5 in the window, 0.866 beyond it by 0.166 of 0.3, 1 at its end, 0 at the other.
    beyond = 1 - (0.75**0.5 - 0.7) / 0.3
    assert recipe.coherence(embed, "E f. A b.", "C d. E f.") == pytest.approx((1 + beyond) / 2, abs=1e-5)
    assert recipe.coherence(embed, "A b.", "A b. E f.") == pytest.approx(0, abs=1e-5)
    assert recipe.coherence(embed, "A b.", " ... ") == 0


def test_parts_of_the_reward():
    text = "They were happy and glad. " * 4
    found = recipe.make_parts(embed_letters, 0.5)([Turn(LONG, "")] * 3, [text, f"{LONG} {LONG}", "war"])
    assert list(found) == [field.name for field in dataclasses.fields(recipe.Weights)]
    scores = np.array([sentiment("", x) for x in (text, LONG, "war")])
    assert scores[0] > 0.8 and scores[1] == 0 and scores[2] < -0.5
    np.testing.assert_allclose(found["tone"], 1 - np.abs(scores - 0.5) / 2)
    np.testing.assert_allclose(found["variety"], [5 / 19, 12 / 23, 1])
    np.testing.assert_allclose(found["originality"], [1, 1 / 23, 1])  # night and
    np.testing.assert_allclose(found["length"], [1, 1, 0])
    near = recipe.make_judges(embed_letters)([Turn("", "abc")], ["abc"])
    np.testing.assert_allclose(near["nearness to the passage's"], 1, atol=1e-6)


@pytest.fixture
def config(tmp_path, monkeypatch):
    passages = [
        f"The {a} and the {b} were by the way of the hill. And there was a {b} in the place of the {a}, and it "
        f"was good for the {a} to be there."
        for a, b in itertools.permutations(WORDS[:6], 2)
    ]
    policy = tiny_policy(passages)
    monkeypatch.setattr(recipe, "read_passages", lambda corpus: passages)
    monkeypatch.setattr(writing, "load_policy", lambda place, dtype, params_dtype: policy)
    monkeypatch.setattr(recipe, "load_encoder", lambda: None)
    monkeypatch.setattr(recipe, "make_embed", lambda encoder: embed_letters)
    dropped = recipe.Config().writing.dropped
    return recipe.Config(writing=Writing(dropped=dropped, dropped_steps=1, reinforce=SMALL, results=tmp_path / "story"))


@pytest.mark.slow
def test_recipe_writes_a_table_a_figure_and_examples(config, monkeypatch):
    seen, make_fit = [], writing.make_fit

    def watched(policy):
        fit = make_fit(policy)
        return lambda index, batch: seen.append(batch) or fit(index, batch)

    monkeypatch.setattr(writing, "make_fit", watched)
    recipe.main(config)
    for rollout, others, mask in seen:  # completions of another opening, two of each
        prompts = np.where(rollout.prompt_mask, rollout.prompts, -1)
        np.testing.assert_array_equal(np.where(mask, others, -1), np.roll(prompts, 2, axis=0))
    assert len(seen) == 3
    rows = {row["measure"]: row for row in json.loads((config.writing.results / "table.json").read_text())}
    assert [*rows["tone"]][1:] == ["before", "after", "without coherence, variety, originality"]
    assert {"coherence", "wins by nearness to the passage's", "wins by fit, nats"} <= set(rows)
    assert rows["KL, nats"]["after"]["value"] > 0 and rows["truncated"]["before"] > 0.5
    assert (config.writing.results / "policies.png").read_bytes()[:4] == b"\x89PNG"
    assert "- a person: And there was a" in (config.writing.results / "examples.md").read_text()


def test_a_tone_that_vader_cannot_give_is_refused(config):
    with pytest.raises(InputError, match=r"tone is 1\.5"):
        recipe.main(dataclasses.replace(config, tone=1.5))
    assert not config.writing.results.exists()


@pytest.fixture
def from_scratch(config, tmp_path):
    """The same with a corpus in a file, of whose held-out passages a policy of its own continues some."""
    passages = [
        f"The {a} and the {b} and the {c} were by the way of the hill. And there was a {b} in the place of the {a}, "
        f"and it was good for the {c} to be there."
        for a, b, c in itertools.permutations(WORDS, 3)
    ]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": passage}) + "\n" for passage in passages))
    pretrain = Pretraining(vocab_size=280, context=80, layers=1, width=16, heads=2, batch_size=8, steps=3, warmup=1)
    writing = dataclasses.replace(config.writing, policy="")
    return dataclasses.replace(config, corpus=str(corpus), pretrain=pretrain, writing=writing)


@pytest.mark.slow
def test_a_policy_of_its_own_is_pretrained_on_what_is_not_continued(from_scratch):
    (folder := from_scratch.writing.results).mkdir()
    (folder / "table.md").write_text("| of another run |\n")  # as a clone has it
    recipe.main(from_scratch)
    assert (folder / "pretrained/metrics.jsonl").read_text().count('"stage": "pretrain"') == 3
    openings = {passage.split(". ")[0] + "." for passage in held_out_passages(from_scratch.corpus)}
    asked = [line[3:] for line in (folder / "examples.md").read_text().splitlines() if line.startswith("## ")]
    assert len(asked) == 8 and set(asked) <= openings


@pytest.mark.parametrize(
    "pretrain, policy, words",
    [
        (Pretraining(vocab_size=280, steps=0), "", "steps is 0"),
        (Pretraining(model=Path("smollm2")), "", r"pretrain\.model has no effect"),
        (Pretraining(steps=2), "smollm2", "no effect on a policy that is given"),
    ],
)
def test_pretraining_that_cannot_be_is_refused_before_anything_is_trained(from_scratch, pretrain, policy, words):
    writing = dataclasses.replace(from_scratch.writing, policy=policy)
    with pytest.raises(InputError, match=words):
        recipe.main(dataclasses.replace(from_scratch, pretrain=pretrain, writing=writing))
    assert not writing.results.exists()


def test_a_folder_of_another_run_is_not_written_to(from_scratch):
    (folder := from_scratch.writing.results).mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError):
        recipe.main(from_scratch)
