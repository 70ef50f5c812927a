"""Going on with a given model: where it begins, what it keeps, and what it refuses."""

import dataclasses
import json

import pytest

from experiments import pipeline, pretrain
from rl_jax.data.corpus import read_passages
from rl_jax.errors import InputError
from rl_jax.models.huggingface import load_policy

FIRST = pretrain.Pretraining(vocab_size=300, context=32, layers=1, width=16, heads=2, steps=8, batch_size=8)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "prose.txt"
    path.write_text("\n\n".join(read_passages("bbe")[:200]), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def first(tmp_path_factory, corpus):
    run = tmp_path_factory.mktemp("first") / "run"
    pretrain.main(pretrain.Config(FIRST, run=run, corpus=corpus))
    return run


def test_a_given_model_goes_on_from_where_it_was(first, corpus, tmp_path):
    settings = pretrain.Pretraining(model=first / "policy", context=32, steps=4, batch_size=8, learning_rate=1e-2)
    pretrain.main(pretrain.Config(settings, run=tmp_path / "run", corpus=corpus))
    old, new = (json.loads((run / "summary.json").read_text()) for run in (first, tmp_path / "run"))
    for name in ("held_out_loss", "held_out_perplexity", "held_out_bits_per_byte"):
        assert new[f"{name}_before"] == pytest.approx(old[name], rel=1e-5)
        assert new[name] < 0.99 * old[name] and f"{name}_before" not in old
    before, after = (load_policy(run / "policy") for run in (first, tmp_path / "run"))
    assert before.config == after.config and before.tokenizer.get_vocab() == after.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 2, "family": "gpt2"}, "family, layers have no effect with model"),
        ({"context": 33}, "context is 33; the model reads at most 32 tokens"),
    ],
)
def test_what_a_given_model_leaves_without_effect(first, corpus, tmp_path, changes, message):
    settings = dataclasses.replace(pretrain.Pretraining(model=first / "policy", context=32), **changes)
    for script in (pretrain, pipeline):
        with pytest.raises(InputError, match=message):
            script.main(script.Config(pretrain=settings, run=tmp_path / "run", corpus=corpus))
    assert not (tmp_path / "run").exists()
