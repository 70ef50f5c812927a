"""Policies beside each other: every figure of the table against what the files of the run say, worked out plainly."""

import dataclasses
import itertools
import json
import math

import jax
import numpy as np
import pytest
import scipy.special

from experiments import evaluate
from experiments.complete import Sampled, alike, complete
from experiments.evaluate_figures import distance
from rl_jax.data.prompts import encode_prompts
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.evaluation import Estimate
from rl_jax.models.config import llama
from rl_jax.models.huggingface import Policy, load_policy, save_policy
from rl_jax.models.transformer import hidden_states, init_params, logits
from rl_jax.rewards.compose import RewardConfig
from rl_jax.rollout import generate
from rl_jax.sampling import Sampling
from rl_jax.types import Rollout

PROMPTS = ("abab", "ba", "xyz")
REWARD = RewardConfig(names=("tests.test_evaluate:vowels", "regex"), pattern="[a-m]")
JUDGE = "tests.test_evaluate:longer"
GROUP = 4


def vowels(prompt, completion):
    return float(sum(map(completion.count, "aeiou")) - len(completion) / 10)


def longer(prompt, first, second):
    """Favours the longer, and besides what it is shown first."""
    return min(1.0, 0.1 + 0.5 * (1 + np.sign(len(first) - len(second))))


def broken(prompt, first, second):
    return "the first"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two policies that are alike, and one with another vocabulary."""
    folder = tmp_path_factory.mktemp("policies")
    config, texts = llama(260, 24, 1, 16, 2), {"first": "abab", "second": "abab", "other": "zqzq"}
    for number, (name, text) in enumerate(texts.items()):
        tokenizer = train_tokenizer([f"{text} {text}"], 260)
        params = init_params(jax.random.key(number), config)
        params = jax.tree.map(lambda x: 4 * x, params)
        save_policy(folder / name, Policy(params, config, tokenizer))
    return folder


@pytest.fixture(scope="module")
def run(folders):
    config = evaluate.Config(
        policies=(folders / "first", folders / "second", folders / "other"),
        reward=REWARD,
        best_of=(1, 2, GROUP),
        judge=JUDGE,
        prompts=PROMPTS,
        completions=GROUP,
        length=6,
        temperature=1.0,
        run=folders / "run",
    )
    evaluate.main(config)
    return folders / "run"


def lines(run, name, policy):
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [row for row in rows if row["policy"].endswith(policy)]


def table(run):
    return {(row["policy"].split("/")[-1], row["best of"]): row for row in json.loads((run / "table.json").read_text())}


def grouped(run, policy, reward):
    rows = [row for row in lines(run, "completions.jsonl", policy) if row["best_of"] == 1]
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(GROUP)]
    return np.array([row["rewards"][reward] for row in rows]).reshape(-1, GROUP)


def over_subsets(rewards, values, n):
    """The mean over prompts of a value of the best of every n, those that tie taken for one another."""
    found = []
    for row, quantity in zip(rewards, values, strict=True):
        for subset in itertools.combinations(range(GROUP), n):
            tied = [i for i in subset if row[i] == max(row[j] for j in subset)]
            found.append(np.mean(quantity[tied]))
    return np.mean(found)


@pytest.mark.parametrize("policy", ["first", "second", "other"])
def test_rewards_are_those_of_every_best_of_n(run, policy):
    proxy = grouped(run, policy, REWARD.names[0])
    for n, reward in itertools.product((1, 2, GROUP), REWARD.names):
        expected = over_subsets(proxy, grouped(run, policy, reward), n)
        assert table(run)[policy, n][f"reward {reward}"]["value"] == pytest.approx(expected, abs=1e-6)
    for row in lines(run, "completions.jsonl", policy):
        text = row["completion"]
        assert row["rewards"][REWARD.names[0]] == pytest.approx(vowels("", text), abs=1e-6)
        assert row["rewards"]["regex"] == any("a" <= x <= "m" for x in text)


def test_chosen_completions_are_the_best_of_the_first_n(run):
    every = [row for row in lines(run, "completions.jsonl", "second") if row["best_of"] == 1]
    for n in (2, GROUP):
        chosen = [row for row in lines(run, "completions.jsonl", "second") if row["best_of"] == n]
        for number, row in enumerate(chosen):
            group = every[GROUP * number :][:n]
            best = max(group, key=lambda x: x["rewards"][REWARD.names[0]])
            assert {**row, "best_of": 1} == best
        assert len(chosen) == len(PROMPTS)


@pytest.mark.parametrize("policy", ["first", "second"])
def test_wins_by_a_judge_are_those_of_the_verdicts_in_both_orders(run, policy):
    rows = lines(run, "verdicts.jsonl", policy)
    sampled = [row for row in lines(run, "completions.jsonl", policy) if row["best_of"] == 1]
    assert [row["completion"] for row in rows] == [row["completion"] for row in sampled]
    for row in rows:
        pair = row["completion"], row["against"]
        assert row["verdicts"] == [longer("", *pair), longer("", *pair[::-1])]
    # The best of the first policy would beat itself too often: it meets completions that it was not chosen from.
    firsts = [row["completion"] for row in lines(run, "completions.jsonl", "first") if row["best_of"] == 1]
    assert [row["against"] for row in rows] != firsts
    wins = np.array([(a + 1 - b) / 2 for a, b in (row["verdicts"] for row in rows)]).reshape(-1, GROUP)
    proxy = grouped(run, policy, REWARD.names[0])
    for n in (1, 2, GROUP):
        assert table(run)[policy, n][f"wins by {JUDGE}"]["value"] == pytest.approx(over_subsets(proxy, wins, n))
    bias = np.mean([sum(row["verdicts"]) - 1 for row in rows])
    assert table(run)[policy, 1]["position bias"]["value"] == pytest.approx(bias)
    assert bias > 0.05


def test_pass_at_k_and_what_belongs_to_a_policy_alone(run):
    for policy in ("first", "second", "other"):
        correct = grouped(run, policy, "regex")
        for k in (2, GROUP):
            expected = [1 - math.comb(GROUP - int(c), k) / math.comb(GROUP, k) for c in correct.sum(axis=1)]
            assert table(run)[policy, 1][f"pass@{k} regex"]["value"] == pytest.approx(np.mean(expected))
        row, best = table(run)[policy, 1], table(run)[policy, GROUP]
        assert 0 < row["distinct-2"] <= 1 and best["distinct-2"] is None
        assert 1 <= row["length"] <= 6 and 1 <= best["length"] <= 6
        assert f"pass@2 {REWARD.names[0]}" not in row


def test_divergence_is_given_where_it_can_be_worked_out(run, folders):
    rows = table(run)
    assert rows["first", 1]["KL, nats"] == {"value": 0, "low": 0, "high": 0}
    assert rows["first", GROUP]["KL at most"] == pytest.approx(math.log(GROUP) - 1 + 1 / GROUP)
    assert rows["second", 1]["KL, nats"]["value"] > 0.1 and rows["second", 1]["KL at most"] is None
    assert rows["second", 2]["KL, nats"] is None
    assert all(rows["other", n][name] is None for n in (1, GROUP) for name in ("KL, nats", "KL at most"))
    first, second, other = (load_policy(folders / name) for name in ("first", "second", "other"))
    assert alike(first, second) and not alike(first, other)
    assert not alike(first, second._replace(config=dataclasses.replace(second.config, rope_theta=7.0)))


def test_wins_by_a_reward_are_over_all_pairs_with_completions_of_the_first_policy(run):
    against = np.array([vowels("", row["against"]) for row in lines(run, "verdicts.jsonl", "second")])
    against = against.astype(np.float32).reshape(-1, 1, GROUP)
    for policy, n in itertools.product(("first", "second", "other"), (1, 2, GROUP)):
        proxy = grouped(run, policy, REWARD.names[0])
        mine = proxy.astype(np.float32)[:, :, None]
        wins = ((mine > against) + 0.5 * (mine == against)).mean(axis=2)
        found = table(run)[policy, n][f"wins by {REWARD.names[0]}"]["value"]
        assert found == pytest.approx(over_subsets(proxy, wins, n))


def sampled_by_hand(kl, log_ratio):
    """One prompt, three completions of 1, 2 and 3 tokens."""
    mask = np.arange(3) < np.array([[1], [2], [3]])
    rollout = Rollout(None, None, np.full((3, 3), 7), mask, None, np.array([False, False, True]))
    rewards = {"good": np.array([[0.0, 1.0, 2.0]])}
    return Sampled(rollout, ["a", "b", "c"], rewards, kl, log_ratio)


def test_row_by_hand():
    config = evaluate.Config((), reward=RewardConfig(names=("good",)), best_of=(1, 2))
    sampled = sampled_by_hand(np.array([[1.0, 2.0, 6.0]]), np.array([[3.0, 0.0, 6.0]]))
    one, two = (evaluate.row("p", sampled, n, {}, None, [], config) for n in (1, 2))
    assert one["reward good"].value == 1 and two["reward good"].value == pytest.approx(5 / 3)  # 1, 2 and 2
    assert one["KL, nats"].value == 3 and two["KL, nats"] is None
    assert two["KL at most"] == pytest.approx(math.log(2) - 1 / 2 + (0 + 6 + 6) / 3)
    assert one["length"] == 2 and two["length"] == pytest.approx((2 + 3 + 3) / 3)
    assert one["truncated"] == pytest.approx(1 / 3) and two["truncated"] == pytest.approx(2 / 3)
    assert one["distinct-2"] == pytest.approx(1 / 3)
    filtered = evaluate.row("p", sampled, 2, {}, None, [], dataclasses.replace(config, top_k=2))
    assert filtered["KL at most"] is None


def test_blocks_are_parts_of_one_batch_and_the_divergence_is_that_of_the_distributions(folders):
    first, second = (load_policy(folders / name) for name in ("first", "second"))
    texts = [f"{i} ab" for i in range(10)]  # on eight devices, a block and a part of one
    prompts = encode_prompts(first.tokenizer, texts, 24, 6)
    sampling, key = Sampling(6, 2, temperature=0.7, eos=(0,)), jax.random.key(3)
    sampled = complete(second, first, prompts, {}, sampling, key, "test")
    config, rollout = first.config, sampled.rollout
    whole = jax.jit(lambda params: generate(params, key, *prompts, config, sampling))(second.params)
    np.testing.assert_array_equal(rollout.completions, whole.completions)
    np.testing.assert_array_equal(rollout.completion_mask, whole.completion_mask)
    assert sampled.texts[3] == first.tokenizer.decode(rollout.completions[3][: rollout.completion_mask[3].sum()])

    tokens, mask = (
        np.concatenate(x, axis=1)
        for x in ((rollout.prompts, rollout.completions), (rollout.prompt_mask, rollout.completion_mask))
    )
    forward = jax.jit(lambda params: logits(params, hidden_states(params, tokens, mask, config), config))
    logprobs = [scipy.special.log_softmax(np.asarray(forward(x.params)) / 0.7, axis=-1) for x in (second, first)]
    kl, log_ratio = np.zeros(20), np.zeros(20)
    for b, c in itertools.product(range(20), range(6)):
        if rollout.completion_mask[b, c]:
            p, q = (x[b, prompts[0].shape[1] + c - 1] for x in logprobs)
            kl[b] += np.exp(p) @ (p - q)
            log_ratio[b] += (p - q)[rollout.completions[b, c]]
    np.testing.assert_allclose(sampled.kl.reshape(-1), kl, rtol=1e-3)
    np.testing.assert_allclose(sampled.log_ratio.reshape(-1), log_ratio, rtol=1e-3, atol=1e-4)


def test_run_has_its_figure_and_settings(run):
    assert (run / "evaluate.png").read_bytes()[:4] == b"\x89PNG"
    settings = json.loads((run / "settings.json").read_text())["settings"]
    assert settings["best_of"] == [1, 2, GROUP] and settings["seconds"] > 0


def test_distance_is_the_root_of_the_kl_or_of_its_bound():
    assert distance({"KL, nats": Estimate(4.0, 0.0, 9.0), "KL at most": None}) == 2
    assert distance({"KL, nats": None, "KL at most": 9.0}) == 3
    assert distance({"KL, nats": None, "KL at most": None}) is None


def prompts_of(tmp_path, name, text, **settings):
    (tmp_path / name).write_text(text, "utf-8")
    config = evaluate.Config((tmp_path,), prompt_file=tmp_path / name, **settings)
    tokenizer = train_tokenizer(["abab abab"], 260)
    return [asked.text for asked in evaluate.read_prompts(config, tokenizer, tokenizer)]


def test_prompts_come_from_files(tmp_path):
    assert prompts_of(tmp_path, "a.txt", "one \n\n two\n") == ["one ", " two"]
    rows = "\n".join(json.dumps({"prompt": str(i), "more": 1}) for i in range(10))
    assert prompts_of(tmp_path, "a.jsonl", rows) == list("0123456789")
    assert prompts_of(tmp_path, "a.jsonl", rows, most_prompts=4) == list("0257")
    for bad in ("no json", "[1]", '{"text": "a"}', '{"prompt": 3}'):
        with pytest.raises(InputError, match=r"b\.jsonl, line 3 "):
            prompts_of(tmp_path, "b.jsonl", '{"prompt": "a"}\n\n' + bad)
    with pytest.raises(InputError, match="has no row that can be used"):
        prompts_of(tmp_path, "empty.txt", "\n")
    with pytest.raises(InputError, match=r"a\.csv is of no kind whose rows can be read"):
        prompts_of(tmp_path, "a.csv", "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policies": ()}, "at least one policy"),
        ({"policies": ("first", "first")}, "none twice"),
        ({"policies": ("nothing",)}, "There is no folder .*nothing"),
        ({"best_of": (1, 17)}, "needs more --completions"),
        ({"best_of": (0,)}, "from 1 to completions, 16"),
        ({"best_of": (2, 2)}, "different numbers"),
        ({"best_of": ()}, "different numbers"),
        ({"completions": 0}, "completions is 0"),
        ({"temperature": 0.0}, "--completions 1"),
        ({"judge": JUDGE}, "nothing to compare"),
        ({"judge": "tests.test_evaluate:broken", "best_of": (2,)}, "broken gave array"),
        ({"judge": "tests.test_evaluate:vowels", "best_of": (2,)}, "must take a prompt and two completions"),
        ({"prompts": ()}, "Prompts come from one place"),
        ({"prompts_from": "bbe"}, "Prompts come from one place"),
        ({"prompt_length": 4}, "prompt_length is of passages"),
        ({"prompts": ("x" * 20,)}, "leaves room for 18"),
        ({"reward": RewardConfig(names=("regex", "regex"), pattern="a")}, "named twice"),
        ({"reward": RewardConfig(names=("regex",), pattern="a", weights=(2.0,))}, "weights has no effect"),
        ({"reward": RewardConfig(names=("regex",), pattern="a", target_length=3)}, "no reward uses it"),
        ({"reward": RewardConfig(names=("sentimnt",))}, "did you mean sentiment"),
        ({"top_p": 2.0}, "top_p <= 1"),
        ({"seed": -1}, "The seed is -1"),
    ],
)
def test_mistakes_are_refused_before_anything_is_sampled_or_written(folders, tmp_path, change, message):
    settings = {"policies": ("first",), "prompts": ("abab",), "length": 6, "reward": REWARD, "run": tmp_path / "run"}
    settings |= change
    settings["policies"] = tuple(folders / name for name in settings["policies"])
    with pytest.raises(InputError, match=message):
        evaluate.main(evaluate.Config(**settings))
    assert not (tmp_path / "run").exists()


def test_folder_that_is_taken_is_refused(run, folders):
    with pytest.raises(InputError, match="exists"):
        evaluate.main(evaluate.Config((folders / "first",), prompts=PROMPTS, run=run))


def test_each_reward_gets_its_own_settings_alone():
    config = RewardConfig(names=("length", "regex"), pattern="a", target_length=3)
    judges = evaluate.make_rewards(config, train_tokenizer(["abab abab"], 260), {})
    assert list(judges) == ["length", "regex"]
