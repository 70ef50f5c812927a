"""The recipe that makes replies more relevant: its turns and the parts of its reward by hand, and all in miniature."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from writing_for_tests import SMALL, WORDS, embed_letters, tiny_policy

from experiments.recipes import dialogue as recipe
from experiments.recipes import writing
from experiments.recipes.writing import Turn, Writing
from experiments.recipes.writing_parts import word_rarity
from rl_jax.errors import InputError


def test_a_message_is_the_first_of_its_length_that_is_replied_to():
    long, short, reply = "do you like the sea at night", "hello there", "yes I do"
    assert recipe.message_and_reply([long, reply, short]) == Turn(long, reply)
    assert recipe.message_and_reply([short, long, reply]) == Turn(long, reply)
    assert recipe.message_and_reply([long, "yes", long, reply]) == Turn(long, reply)
    assert recipe.message_and_reply([short] * 3 + [long, reply]) == Turn(long, reply)
    assert recipe.message_and_reply([short] * 4 + [long, reply]) is None
    assert recipe.message_and_reply([long]) is recipe.message_and_reply([]) is None
    assert recipe.message_and_reply([" ".join(["word"] * 26), reply]) is None


def test_parts_of_the_reward():
    rarity = word_rarity(["the cat sat", "the dog sat", "the cat", "the tree"])
    turns = [Turn("The cat sat on the mat.", "")] * 3
    replies = ["The cat sat on the mat.", "The cat, the cat? The sat and then all of that, so.", "No"]
    found = recipe.make_parts(embed_letters, rarity)(turns, replies)
    assert list(found) == [field.name for field in dataclasses.fields(recipe.Weights)]
    message, *others = embed_letters([turns[0].prompt, *replies])
    np.testing.assert_allclose(found["relevance"], np.array(others) @ message, atol=1e-6)
    assert found["relevance"][0] > 0.999 and found["relevance"][2] < 0.3
    rare = 1  # of cat and sat; of the, 0; the others are not known
    np.testing.assert_allclose(found["specificity"], [2 * rare / 6, 3 * rare / 12, 0])
    np.testing.assert_array_equal(found["question"], [0, 1, 0])
    np.testing.assert_allclose(found["variety"], [1, 1 - 2 / 11, 1])  # the cat and cat the, again
    np.testing.assert_allclose(found["originality"], [0, 1 - 2 / 11, 1])  # the cat, twice
    np.testing.assert_allclose(found["length"], [6 / 8, 1, 0])


def test_judges_ask_for_the_persons_reply():
    found = recipe.make_judges(embed_letters)([Turn("abc", "xyz"), Turn("abc", "xyz")], ["xyz", "abc great"])
    np.testing.assert_allclose(found["nearness to the person's"][0], 1, atol=1e-6)
    assert found["nearness to the person's"][1] < 0.5 and found["VADER"][1] > 0.5 > found["VADER"][0] == 0


@pytest.fixture
def config(tmp_path, monkeypatch):
    conversations = [
        f"do you like the {a} and the {b}?\nI like a {b} with a {a}, do you?\nyes"
        for a, b in itertools.permutations(WORDS[:6], 2)
    ]
    policy = tiny_policy(conversations)
    monkeypatch.setattr(recipe, "read_passages", lambda corpus: conversations)
    monkeypatch.setattr(writing, "load_policy", lambda place, dtype, params_dtype: policy)
    monkeypatch.setattr(recipe, "load_encoder", lambda: None)
    monkeypatch.setattr(recipe, "make_embed", lambda encoder: embed_letters)
    settings = Writing(dropped=("originality",), dropped_steps=1, reinforce=SMALL, results=tmp_path / "dialogue")
    return recipe.Config(instruction="Hi.", writing=settings)


@pytest.mark.slow
def test_recipe_writes_a_table_a_figure_and_examples_and_goes_on_where_it_stopped(config, monkeypatch):
    drawn, draw_writing = [], writing.draw_writing
    monkeypatch.setattr(writing, "draw_writing", lambda *args: drawn.append(args) or draw_writing(*args))
    recipe.main(config)
    folder, name = config.writing.results, "without originality"
    table = json.loads((folder / "table.json").read_text())
    rows = {row["measure"]: row for row in table}
    for side in ("after", name):
        assert 0 <= rows["wins by the reward"][side]["value"] <= 1 and rows["KL, nats"][side]["value"] > 0
    assert {"wins by nearness to the person's", "wins by VADER", "wins by fit, nats", "originality"} <= set(rows)
    assert rows["originality"]["before"]["value"] > 0.5 and rows["wins by VADER"]["before"] is None
    assert (folder / "policies.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "examples.md").read_text().count("\n## ") == 8
    runs = ((folder / run / "metrics.jsonl").read_text().splitlines() for run in ("after", "warning"))
    after, warning = ([json.loads(line) for line in lines] for lines in runs)
    assert [row["step"] for row in after] == [0, 1, 2] and "gold" not in after[0]
    originality = (warning[0]["gold"] - warning[0]["reward"]) / 2  # the whole reward has it too, with the weight 2
    assert len(warning) == 1 and 0.5 < originality <= 1 and warning[0]["gold"] == pytest.approx(after[0]["reward"])
    whole = {side: [row["whole"] for row in rows] for side, rows in drawn[0][1].items()}
    assert whole == {"after": [row["reward"] for row in after], name: [warning[0]["gold"]]}
    with pytest.raises(InputError, match="exists"):
        recipe.main(config)
    recipe.main(dataclasses.replace(config, writing=dataclasses.replace(config.writing, resume=True)))
    assert json.loads((folder / "table.json").read_text()) == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropped": ("charm",)}, "charm is no part"),
        ({"dropped": tuple(dataclasses.asdict(recipe.Weights()))}, "drop some"),
        ({"dropped": ()}, "drop some"),
        ({"dropped_steps": 0}, "dropped_steps is 0"),
        ({"seed": -1}, "The seed is -1"),
        ({"reinforce": dataclasses.replace(SMALL, as_chat=True)}, "as_chat has no effect"),
        ({"reinforce": dataclasses.replace(SMALL, prompts=24)}, "need 32"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(config, change, message):
    with pytest.raises(InputError, match=message):
        recipe.main(dataclasses.replace(config, writing=dataclasses.replace(config.writing, **change)))
    assert not config.writing.results.exists()


def test_weights_that_are_no_numbers_are_refused(config):
    with pytest.raises(InputError, match="not all finite"):
        recipe.main(dataclasses.replace(config, weights=recipe.Weights(length=float("nan"))))
