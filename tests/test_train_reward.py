"""The script that learns a reward model, from files of every kind: what it writes, keeps, refuses and guards."""

import json

import jax
import numpy as np
import pytest

from experiments import train_reward
from experiments.judgements import kind_of, split_rows, without_every_second_end
from experiments.pretrain import Pretraining, model_config
from rl_jax.data.preferences import Judged
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.huggingface import Policy, save_policy
from rl_jax.models.reward_model import load_reward_model
from rl_jax.models.transformer import init_params
from rl_jax.types import PreferenceBatch
from tests.test_pipeline import rows

LEARN = train_reward.Learning(
    steps=12, batch_size=16, learning_rate=3e-3, warmup=1, evaluate_every=6, checkpoint_every=12
)
WORDS = ("good", "great", "fine", "bad", "poor", "dull")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """An untrained policy with words of its own."""
    config = model_config(Pretraining(vocab_size=276, context=32, layers=2, width=16, heads=2))
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, config.vocab_size)
    save_policy(folder, Policy(init_params(jax.random.key(0), config), config, tokenizer))
    return folder


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def texts(count):
    """Pairs of a text with more good words than the other."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        chosen, rejected = (" ".join(rng.choice(part, 3)) for part in (WORDS[:3], WORDS[3:]))
        yield {"prompt": "It is", "chosen": " " + chosen, "rejected": " " + rejected, "gap": float(rng.uniform(0, 2))}


def config(policy, path, tmp_path, **changes):
    return train_reward.Config(
        policy, path, learn=LEARN, run=tmp_path / "run", normalize_prompts=16, completion_length=8, **changes
    )


def test_pairs_are_learned_and_what_is_measured_is_written(policy, tmp_path, capsys):
    lines = [*texts(200), "not JSON", {"prompt": "It is", "chosen": " good " * 40, "rejected": " bad"}]
    learn = train_reward.Learning(
        **vars(LEARN) | {"members": 2, "curve_shares": (0.1, 1.0), "curve_layers": (1,), "label_smoothing": 0.05}
    )
    settings = config(policy, write(tmp_path / "pairs.jsonl", lines), tmp_path)
    train_reward.main(train_reward.Config(**vars(settings) | {"learn": learn}))
    summary = json.loads((settings.run / "summary.json").read_text())["reward_model"]
    assert (summary["kind"], summary["members"], summary["broken_rows"]) == ("pairs", 2, 2)
    assert summary["train_rows"] + summary["held_out_rows"] == 200
    assert summary["pair_accuracy"] > 0.95, "good words against bad ones"
    assert [point["pairs"] for point in summary["learning_curve"]] == [18, 180]
    assert {stage for stage, _ in rows(settings.run)} == {"reward", "reward_curve_1"}
    said = capsys.readouterr().out
    assert "line 201" in said and "longer than the context" in said
    assert load_reward_model(settings.run / "reward").params["reward_head"]["kernel"].shape == (2, 16, 1)
    assert "Reward model" in (settings.run / "report.html").read_text()


@pytest.mark.slow
def test_rankings_and_ratings_are_learned(policy, tmp_path):
    rng = np.random.default_rng(0)
    prompts = [f"It {word} is" for word in "abcdefghijklmnopqrst"]
    ranked = []
    for number in range(120):
        completions = [" " + " ".join(rng.choice(part, 2)) for part in (WORDS[:3], WORDS, WORDS[3:])]
        scores = [sum(word in WORDS[:3] for word in text.split()) for text in completions]
        ranked.append({"prompt": prompts[number % 20], "completions": completions, "scores": scores})
    rated = [
        {"prompt": row["prompt"], "completion": text, "rating": score}
        for row in ranked
        for text, score in zip(row["completions"], row["scores"], strict=True)
    ]
    for name, lines, measure in (("rankings", ranked, "kendall_tau"), ("ratings", rated, "pearson")):
        settings = config(policy, write(tmp_path / f"{name}.jsonl", lines), tmp_path / name)
        train_reward.main(settings)
        summary = json.loads((settings.run / "summary.json").read_text())["reward_model"]
        assert summary["kind"] == name and summary[measure] > 0.6


def test_held_out_rows_share_no_prompt_with_those_learned_from():
    rows = [Judged(f"prompt {number % 50}", (f"a {number % 90}", "b"), (1.0, 0.0)) for number in range(200)]
    train, held_out = split_rows(rows)
    assert len(train) + len(held_out) == 200 and 10 <= len(held_out) <= 30
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    texts = [Judged("", (f"a {number // 3}", f"b {number // 2}"), (1.0, 0.0)) for number in range(0, 300, 2)]
    train, held_out = split_rows(texts)
    assert held_out
    assert not {text for row in train for text in row.completions} & {t for row in held_out for t in row.completions}


def test_rows_that_all_hang_together_are_split_one_by_one(capsys):
    train, held_out = split_rows([Judged("same", (f"{number}", "b"), (1.0, 0.0)) for number in range(40)])
    assert (len(train), len(held_out)) == (36, 4) and not set(train) & set(held_out)
    assert "share prompts" in capsys.readouterr().out


def test_every_second_row_is_also_read_where_there_is_no_end():
    mask = np.arange(4) < np.array([[3, 2], [4, 1], [2, 2], [3, 4]])[:, :, None]
    batch = PreferenceBatch(*[np.zeros((4, 1))] * 2, np.zeros(mask.shape), mask, np.zeros((4, 2)), np.zeros(4))
    found = without_every_second_end(batch)
    np.testing.assert_array_equal(found.completion_mask.sum(axis=2), [[3, 2], [3, 1], [2, 2], [2, 3]])
    np.testing.assert_array_equal(mask.sum(axis=2), [[3, 2], [4, 1], [2, 2], [3, 4]])


def flipped(loss):
    def opposite(rewards, labels, margins, *, label_smoothing):
        return loss(rewards, 1 - labels, margins, label_smoothing=label_smoothing)

    return opposite


def test_a_flipped_sign_is_caught_before_it_is_optimised(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(train_reward, "bradley_terry_loss", flipped(train_reward.bradley_terry_loss))
    settings = config(policy, write(tmp_path / "pairs.jsonl", texts(200)), tmp_path)
    with pytest.raises(InputError, match="prefers what was rejected"):
        train_reward.main(settings)


@pytest.mark.parametrize(
    ("changes", "lines", "message"),
    [
        ({"curve_layers": (1,)}, 100, "no effect without curve_shares"),
        ({"curve_shares": (0.05,)}, 100, "no share that fills a batch"),
        ({"curve_shares": (1.5,)}, 100, "at most 1"),
        ({"layers": 3}, 100, "2 blocks to choose from"),
        ({"label_smoothing": 0.6}, 100, "between 0 and 0.5"),
        ({"centring": -1.0}, 100, "centring must be a number of at least 0"),
        ({"members": 0}, 100, "members is 0"),
        ({"batch_size": 12}, 100, "over 8 devices"),
        ({}, 12, "no share that fills a batch"),
        ({}, 3, "too few rows to hold some out"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(policy, tmp_path, changes, lines, message):
    settings = config(policy, write(tmp_path / "pairs.jsonl", texts(lines)), tmp_path)
    settings = train_reward.Config(**vars(settings) | {"learn": train_reward.Learning(**vars(LEARN) | changes)})
    with pytest.raises(InputError, match=message):
        train_reward.main(settings)
    assert not settings.run.exists()


def test_the_kind_follows_from_the_labels():
    def batch(labels):
        return PreferenceBatch(*[np.zeros((len(labels), 1))] * 4, np.array(labels), np.zeros(len(labels)))

    assert kind_of(batch([[1.0, 0.0], [0.5, 0.5]])) == "pairs"
    assert kind_of(batch([[3.0, 2.0]])) == "rankings"
    assert kind_of(batch([[1.0], [0.0]])) == "ratings"
