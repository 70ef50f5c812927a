"""The ridge regression and the shares of ordered pairs against plain forms; what the recipe holds out and writes."""

import dataclasses
import hashlib
import io
import itertools
import json
import tarfile

import jax
import numpy as np
import pytest

from experiments.compare import Comparing
from experiments.complete import Sampled
from experiments.pretrain import Pretraining, model_config
from experiments.recipes import human_preferences as recipe
from experiments.recipes import human_preferences_data as recipe_data
from experiments.recipes import ridge
from experiments.reinforcing import Reinforcing
from experiments.train_reward import Learning
from experiments.vader_ratings import SOURCES, Rated, Source
from rl_jax.errors import InputError
from rl_jax.evaluation import share_interval
from rl_jax.models.huggingface import Policy
from rl_jax.models.transformer import init_params
from rl_jax.types import PreferenceBatch, Rollout

TEXTS = ["Good, good film!", "a bad film", "dull and bad", "Good and a bit dull", "the the the", "x"]
RATINGS = np.array([3.0, -2.0, -3.0, 1.0, 0.0, -0.5])


def dense_features(texts, vocabulary, idf):
    """TF-IDF of words and pairs of words, one entry after another."""
    matrix = np.zeros((len(texts), len(vocabulary)))
    for row, text in enumerate(texts):
        words = [word.strip("!,.") for word in text.lower().split()]
        words = [word for word in words if len(word) > 1]
        found = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
        for gram in set(found) & set(vocabulary):
            matrix[row, vocabulary.index(gram)] = (1 + np.log(found.count(gram))) * idf[vocabulary.index(gram)]
        if matrix[row].any():
            matrix[row] /= np.linalg.norm(matrix[row])
    return matrix


def test_ridge_is_the_closed_form_of_the_dense_matrix():
    found = ridge.fit_ridge(TEXTS, RATINGS, penalty=0.3)
    vocabulary = list(found.features)
    assert set(vocabulary) == {
        "good", "film", "good good", "good film", "bad", "bad film", "dull", "and", "dull and", "and bad",
        "good and", "and bit", "bit", "bit dull", "the", "the the",
    }  # fmt: skip
    texts_with = [sum(gram in ridge.grams(text) for text in TEXTS) for gram in vocabulary]
    idf = np.log(7 / (1 + np.array(texts_with))) + 1
    features = dense_features(TEXTS, vocabulary, idf)
    inner = features.T @ features + 0.3 * np.eye(len(vocabulary))
    weights = np.linalg.solve(inner, features.T @ (RATINGS - RATINGS.mean()))
    np.testing.assert_allclose(found.coefficients, weights, atol=1e-5)
    new = ["good bad and unknown", "nothing known", ""]
    expected = dense_features(new, vocabulary, idf) @ weights + RATINGS.mean()
    np.testing.assert_allclose(ridge.ridge_ratings(found, new), expected, atol=1e-5)
    assert expected[1] == expected[2] == RATINGS.mean() != expected[0]
    assert ridge.rate_whole(found)("good bad", " and unknown") == pytest.approx(expected[0], abs=1e-5)
    with pytest.raises(InputError, match="no words"):
        ridge.fit_ridge(["x", "!"], RATINGS[:2], 1.0)


def plain_share(rewards, ratings, gap, most=np.inf):
    """Agreement over every pair, one after another."""
    found = []
    for i, j in itertools.combinations(range(len(ratings)), 2):
        apart, led = ratings[i] - ratings[j], rewards[i] - rewards[j]
        if gap < abs(apart) <= most:
            found.append(0.5 if led == 0 else float(led * apart > 0))
    return np.mean(found)


def test_shares_of_ordered_pairs_and_their_jackknife():
    draw = np.random.default_rng(0)
    ratings = np.round(draw.normal(size=30), 1)
    rewards = np.round(ratings + draw.normal(size=(2, 30)), 1)
    shares = [plain_share(row, ratings, 0.5) for row in rewards]
    found = ridge.order_share(rewards, ratings, 0.5)
    assert found.value == pytest.approx(np.mean(shares))
    within = ridge.order_share(rewards[0], ratings, 0.2, 0.9)
    assert within.value == pytest.approx(plain_share(rewards[0], ratings, 0.2, 0.9))

    def without(row, i):
        return plain_share(np.delete(row, i), np.delete(ratings, i), 0.5)

    lead = ridge.order_lead(rewards[:1], rewards[1], ratings, 0.5)
    assert lead.value == pytest.approx(shares[0] - shares[1])
    for estimate, sign in ((found, 1), (lead, -1)):
        left = np.array([without(rewards[0], i) + sign * without(rewards[1], i) for i in range(30)])
        left = left / 2 if sign == 1 else left
        half = 1.959964 * np.sqrt(29 / 30 * np.sum((left - left.mean()) ** 2))
        assert (estimate.high - estimate.low) / 2 == pytest.approx(half)
        assert (estimate.high + estimate.low) / 2 == pytest.approx(estimate.value)
    assert np.isnan(ridge.order_share(rewards, ratings, 100.0).value)


def tar(contents):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as file:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return data.getvalue()


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A recipe of the smallest size, on two collections: 90 rated reviews, of which others repeat a third."""
    draw = np.random.default_rng(0)
    words = ("awful", "bad", "dull", "plain", "good", "great", "superb")
    files, sources = {}, {}
    for stem, first in (("movies", 0), ("others", 60)):
        lines = {}
        for number in range(first, first + 90):
            level = number % 7
            votes = np.clip(draw.integers(-1, 2, 15) + level - 3, -4, 4).tolist()
            lines[number] = (
                np.mean(votes),
                f"The film that is number {number} of them was {words[level]} to see",
                votes,
            )
        texts = "".join(f"{number}\t{mean}\t{text}\n" for number, (mean, text, _) in lines.items())
        rated = "".join(f"{number}\t{mean}\t1\t{votes}\n" for number, (mean, _, votes) in lines.items())
        parts = {"GroundTruth": texts.encode(), "anonDataRatings": rated.encode()}
        files |= {f"hutto_ICWSM_2014/{stem}_{kind}.txt": content for kind, content in parts.items()}
        sources[stem] = Source(stem, 90, *(hashlib.sha256(content).hexdigest() for content in parts.values()))
    path = tmp_path / "sdist.tar.gz"
    path.write_bytes(tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": tar(files)}))
    for name in list(SOURCES):
        monkeypatch.delitem(SOURCES, name)
    for name, source in sources.items():
        monkeypatch.setitem(SOURCES, name, source)
    monkeypatch.setattr(recipe_data, "HELD_OUT", 0.4)
    return recipe.Config(
        sdist=path,
        seeds=1,
        vote_seeds=0,
        held_out_pairs=24,
        pretrain=Pretraining(vocab_size=300, context=64, layers=1, width=16, heads=2, steps=2, batch_size=8),
        learn=Learning(steps=2, batch_size=16),
        reinforce=Reinforcing(
            prompts=8, group_size=2, prompt_length=8, completion_length=8, steps=2, compare=Comparing(16, 2)
        ),
        results=tmp_path / "results",
    )


def test_held_out_snippets_are_nowhere_else(config):
    data = recipe.load_data(config.sdist)
    held_out = {each.text for each in data.held_out}
    assert len(held_out) == len(data.held_out) == 36 and len(data.train) == 54
    assert 60 <= len(data.others) < 90  # of the thirty that are reviews too, those held out are left out
    text = recipe.make_text(data, config.pretrain.vocab_size)
    ends = np.flatnonzero(text.train_tokens == text.tokenizer.eos_token_id)
    parts = np.split(text.train_tokens, ends + 1)[:-1]
    corpus = [text.tokenizer.decode(part[:-1].tolist()) for part in parts]
    assert sorted(corpus) == sorted(each.text for each in (*data.train, *data.others))
    assert not held_out & set(corpus)
    kept, whole = recipe_data.held_out_pairs(data, 24), recipe_data.Seen(dropped=0.0, copies=2, longest=64)
    ratings = recipe_data.make_ratings(data, text.tokenizer, whole, seed=0)
    votes = recipe_data.make_votes(data, text.tokenizer, whole, 64, kept, seed=0)
    assert len(ratings.train.labels) == 2 * 54 and len(votes.train.labels) == 64
    assert len(votes.gaps) == len(votes.votes) == 24
    for judged in (ratings, votes):
        for part, inside in ((judged.train, False), (judged.held_out, True)):
            rows = zip(
                part.completions.reshape(-1, part.completions.shape[2]),
                part.completion_mask.reshape(-1, part.completions.shape[2]),
                strict=True,
            )
            texts = {text.tokenizer.decode(row[mask].tolist(), skip_special_tokens=True) for row, mask in rows}
            assert texts <= held_out if inside else not texts & held_out
    prompts = recipe.make_prompts(config.reinforce, text.tokenizer, text.held_out)
    for tokens, mask in (prompts.train, prompts.held_out):
        first = np.argmax(mask, axis=1)
        assert (tokens[np.arange(len(tokens)), first] == text.tokenizer.eos_token_id).all()
        for row, there in zip(tokens, mask, strict=True):
            opening = text.tokenizer.decode(row[there][1:].tolist())
            assert text.tokenizer.eos_token_id not in row[there][1:] and any(t.startswith(opening) for t in held_out)


def pretrain(settings, text, seed, run, writer):
    """A policy that is as it began: what trains it has tests of its own."""
    model = model_config(settings)
    return Policy(init_params(jax.random.key(seed), model), model, text.tokenizer), {"held_out_loss": 5.0}


def reinforce(settings, policy, reward, prompts, seed, run, writer, gold):
    """The same policy."""
    assert (reward.name, gold.name) == ("learned", "VADER")
    writer.write("rl", 0, {"kl": 0.0, "reward_gain": 0.0, "gold_gain": 0.0})
    return policy


@pytest.mark.slow
def test_recipe_writes_what_it_finds(config, monkeypatch):
    monkeypatch.setattr(recipe, "pretrain", pretrain)
    monkeypatch.setattr(recipe, "reinforce", reinforce)
    recipe.main(config)
    rows = json.loads((config.results / "reward_model/table.json").read_text())
    named = {(row["reward"], row["seed"]): row["pairs over 0.5 apart"] for row in rows}
    assert 0 <= named[f"Transformer, {recipe.RATINGS}", "0"]["value"] <= 1
    assert named["VADER", ""]["value"] > 0.6 and named[recipe.RIVAL, ""]["value"] > 0.8
    policies = json.loads((config.results / "table.json").read_text())
    assert [row["seed"] for row in policies] == ["0", "all"]
    assert policies[0]["KL, nats"]["value"] == pytest.approx(0, abs=1e-4)
    for name in (recipe.LEARNED, "VADER", recipe.OTHER, recipe.SAME):
        assert 0 <= policies[0][f"wins by {name}"]["value"] <= 1
    for name in ("policy.png", "reward_model.png"):
        assert (config.results / name).read_bytes()[:4] == b"\x89PNG"
    examples = (config.results / "examples.md").read_text()
    assert examples.count("before:") == examples.count("after:") == recipe.EXAMPLES
    assert (config.results / "seed_0/policy/model.safetensors").exists()
    assert json.loads((config.results / "found.json").read_text())["pretrained"] == {"held_out_loss": 5.0}


def sampled(rewards, kl):
    """Completions of three prompts, two of each, with these rewards."""
    shape, there = (6, 4), np.ones((6, 4), bool)
    tokens = np.arange(24).reshape(shape) % 5
    rollout = Rollout(tokens, there, tokens, there, np.zeros(shape), np.zeros(6, bool))
    return Sampled(rollout, ["text"] * 6, {"VADER": np.array(rewards, float)}, np.full((3, 2), kl), None)


def test_wins_are_of_completions_of_the_same_prompt_and_pooled_over_seeds():
    before = sampled([[0, 0], [1, 1], [5, 5]], 0.0)
    runs = [
        recipe.Run(np.zeros(1), [], before, sampled([[1, 1], [0, 2], [4, 5]], 3.0)),
        recipe.Run(np.zeros(1), [], before, sampled([[1, 1], [2, 2], [6, 6]], 5.0)),
    ]
    first, second, pooled = recipe.policy_rows(runs, ["VADER"])
    assert first["wins by VADER"].value == pytest.approx((1 + 0.5 + 0.25) / 3)
    assert (second["wins by VADER"].value, first["KL, nats"].value, second["KL, nats"].value) == (1.0, 3.0, 5.0)
    assert pooled["wins by VADER"] == share_interval(np.array([[1, 1], [0.5, 1], [0.25, 1]]))
    assert first["VADER before"].value == 2 and second["VADER after"].value == 3
    assert first["distinct-2 after"] == 5 / 18 and first["length after"] == 4


def test_one_rater_is_compared_with_the_others():
    held_out = [Rated("a", "a", (3, 0, 1)), Rated("b", "b", (0, 2, 2)), Rated("c", "c", (-4, -4, -4))]
    # The first: 3 and 0, of the others 0.5 and 2, wrong; the second: 0 and 2, of 2 and 1, wrong; the third: 1 and 2,
    # of 1.5 and 1, which are no more than 0.5 apart. All put c last, rightly.
    shares = [2 / 3, 2 / 3, 1.0]
    assert recipe.one_rater(recipe_data.Data([], held_out, []), 0.5) == pytest.approx(np.mean(shares))


def test_tokens_are_dropped_and_the_others_moved_together():
    tokens = np.tile(np.arange(1, 41), (500, 2, 1))
    lengths = np.tile([[40], [12]], (500, 1, 1))
    mask = np.arange(40) < lengths
    nothing = np.zeros((500, 1), np.int32)
    batch = PreferenceBatch(nothing, nothing == 0, tokens, mask, np.ones((500, 2)), np.zeros(500))
    found = recipe_data.drop_tokens(batch, 0.25, 30, seed=0)
    counts = found.completion_mask.sum(axis=2)
    for row, there, whole in zip(found.completions[:, 1], found.completion_mask[:, 1], tokens[:, 1], strict=True):
        left = row[there]
        assert there[: len(left)].all() and (np.diff(left) > 0).all() and left[0] == 1 and set(left) <= set(whole[:12])
    assert found.completions.shape == (500, 2, 30) and counts.max() == 30
    assert counts[:, 1].mean() == pytest.approx(1 + 11 * 0.75, abs=0.4)
    assert counts[:, 1].min() < 6 and (counts[:, 1] == 12).any()
    same = recipe_data.drop_tokens(batch, 0.0, 40, seed=0)
    np.testing.assert_array_equal(np.where(mask, same.completions, 0), np.where(mask, tokens, 0))
    np.testing.assert_array_equal(same.completion_mask, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds is 0"),
        ({"penalty": 0.0}, "penalty is 0"),
        ({"vote_seeds": 2}, "vote_seeds is 2"),
        ({"learn": Learning(curve_shares=(0.5,))}, "curve_shares"),
        ({"seen": recipe_data.Seen(dropped=0.6)}, "dropped is 0.6"),
        ({"seen": recipe_data.Seen(longest=65)}, "longest is 65"),
        ({"seen": recipe_data.Seen(copies=0)}, "copies is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(config, change, message):
    with pytest.raises(InputError, match=message):
        recipe.main(dataclasses.replace(config, **change))
    assert not config.results.exists()
