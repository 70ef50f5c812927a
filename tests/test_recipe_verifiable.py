"""The tasks of the recipe `verifiable` against plain arithmetic, pass@k against every subset, and what is written."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.complete import Sampled
from experiments.options import EstimatorOptions
from experiments.pretrain import Pretraining, model_config
from experiments.recipes import verifiable as recipe
from experiments.recipes import verifiable_results as table
from experiments.recipes import verifiable_tasks as tasks
from experiments.reinforcing import Prompts, Reinforcing
from rl_jax.data.corpus import encode_passages
from rl_jax.errors import InputError
from rl_jax.models.huggingface import Policy
from rl_jax.models.transformer import init_params
from rl_jax.types import Rollout

EXPLORING = EstimatorOptions(kl="none", entropy_coefficient=1.0)  # learns something where no answer is right
ADDITION, SORTING, COUNTING = (tasks.make_task(name) for name in ("addition:3", "sorting:5", "counting:6"))


def problems(task, count=200):
    return tasks.draw_problems(task, count, seed=1)


def test_sums_and_their_columns():
    sizes = set()
    for problem in problems(ADDITION):
        a, b = (int(x) for x in problem.question.removesuffix("=").split("+"))
        assert problem.answer == str(a + b)
        assert problem.words == f"What is {a} + {b}?" and problem.key in (f"{a}+{b}", f"{b}+{a}")
        for column in problem.steps.split(","):
            terms, total = column.split("=")
            assert sum(int(x) for x in terms.split("+")) == int(total)
        totals = [column.split("=")[1] for column in problem.steps.split(",")]
        assert totals[-1] + "".join(x[-1] for x in totals[-2::-1]) == problem.answer
        sizes.add(len(str(max(a, b))))
    assert sizes >= {2, 3} and max(sizes) == 3
    carried = [each.steps for each in problems(ADDITION) if sorted(each.key.split("+")) == each.key.split("+")]
    assert any("1+" in steps for steps in carried)


def test_letters_in_order_and_counted():
    for problem in problems(SORTING):
        given = problem.question.removesuffix(":")
        assert len(set(given)) == 5 and problem.answer == "".join(sorted(given)) == problem.key
        assert problem.steps.split(",") == ["".join(sorted(given[:n])) for n in range(1, 5)]
        assert problem.words.endswith(" ".join(given))
    lengths = set()
    for problem in problems(COUNTING):
        letter, word = re.fullmatch(r"([a-d]):([a-d]+)=", problem.question).groups()
        assert problem.answer == str(sum(x == letter for x in word)) and f"letter {letter} in {word}?" in problem.words
        assert problem.steps[::2] == word
        assert (problem.steps[-1] == problem.answer) and problem.steps[1] == str(int(word[0] == letter))
        lengths.add(len(word))
    assert lengths <= set(range(1, 7)) and max(lengths) == 6


@pytest.mark.parametrize("task", [ADDITION, SORTING, COUNTING])
def test_what_is_misread_is_a_problem_near_it_with_another_answer(task):
    rng = np.random.default_rng(0)
    for problem in problems(task):
        other = task.misread(rng, problem)
        assert other.answer != problem.answer and task.grade(problem, other.answer) < 1
        assert task.grade(problem, problem.answer) == 1 == task.grade(other, other.answer)
        apart = sum(x != y for x, y in itertools.zip_longest(problem.question, other.question))
        assert apart == 1 or task is ADDITION  # whose leading digit may vanish
    assert task.misread(np.random.default_rng(3), problem) == task.misread(np.random.default_rng(3), problem)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>85</answer>", "85"),
        ("7+8=15<answer> 8 5\n</answer>\n ", " 8 5\n"),
        ("<answer></answer>", ""),
        ("85", None),
        ("<answer>85", None),
        ("85</answer>", None),
        ("<answer>85</answer>.", None),
        ("<answer>85</answer><answer>85</answer>", None),
        ("<answer><answer>85</answer>", None),
        ("<answer>85</answer></answer>", None),
    ],
)
def test_the_answer_is_what_stands_between_the_tags(completion, answer):
    assert tasks.parse_answer(completion) == answer


@pytest.mark.parametrize(
    ("task", "answer", "given", "grade"),
    [
        (ADDITION, "85", " 85\n", 1),
        (ADDITION, "85", "085", 0),
        (ADDITION, "85", "8 5", 0),
        (COUNTING, "3", "three", 0),
        (SORTING, "abcde", "a b c d e", 1),
        (SORTING, "abcde", "abced", 0.6),
        (SORTING, "abcde", "bcde", 0),
        (SORTING, "abcde", "abcd", 0.8),
        (SORTING, "abcde", "abcdefghij", 0.5),
        (SORTING, "abcde", "", 0),
    ],
)
def test_grades(task, answer, given, grade):
    problem = tasks.Problem("", "", answer, "", "")
    assert task.grade(problem, given) == pytest.approx(grade)
    assert tasks.grade_completion(task, problem, f"<answer>{given}</answer>") == pytest.approx(grade)
    assert tasks.grade_completion(task, problem, given) == 0


def test_the_reward_knows_the_problem_by_its_prompt():
    asked = {"What?": tasks.Problem("", "", "85", "", ""), "Sort!": tasks.Problem("", "", "abcde", "", "")}
    reward = recipe.right_answers(ADDITION, asked, 0.25).on_text
    found = [reward("What?", text) for text in ("1<answer>85</answer>", "<answer>58</answer>", "85")]
    assert found == [1.25, 0.25, 0]
    assert recipe.right_answers(SORTING, asked, 0.25).on_text("Sort!", "<answer>abced</answer>") == pytest.approx(0.85)


def test_the_teacher_is_right_as_often_as_asked_and_longer_when_wrong():
    teacher, rng = (
        tasks.Teacher(right=0.4, untagged=0.2, brief=0.3, doubt=0.1, doubt_if_wrong=0.5),
        np.random.default_rng(0),
    )
    texts = [(each, tasks.teach(ADDITION, each, teacher, rng)) for each in problems(ADDITION) for _ in range(20)]
    tagged = [(each, text) for each, text in texts if tasks.parse_answer(text) is not None]
    assert len(tagged) / len(texts) == pytest.approx(0.8, abs=0.03)
    right = [tasks.grade_completion(ADDITION, *pair) == 1 for pair in tagged]
    assert np.mean(right) == pytest.approx(0.4, abs=0.03)
    assert np.mean(["=" not in text for _, text in texts]) == pytest.approx(0.3, abs=0.03)
    doubts = [
        [text.count("?") for (_, text), each in zip(tagged, right, strict=True) if each == kind]
        for kind in (True, False)
    ]
    assert np.mean(doubts[0]) == pytest.approx(0.1 / 0.9, abs=0.03)
    assert np.mean(doubts[1]) == pytest.approx(1.0, abs=0.15)
    for each, text in tagged[:200]:  # the last attempt is that of the answer
        last = text.partition("<answer>")[0].split("?")[-1]
        if last and tasks.grade_completion(ADDITION, each, text) == 1:
            assert last == each.steps


def test_a_token_for_each_character_and_tag():
    tokenizer = tasks.make_tokenizer()
    text = "<|endoftext|>37+48=7+8=15?c:ba,<answer>85</answer>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|endoftext|>", *"37+48=7+8=15?c:ba,", "<answer>", "8", "5", "</answer>",
    ]  # fmt: skip
    assert tokenizer.decode(ids[1:]) == text.removeprefix("<|endoftext|>") and ids[0] == tokenizer.eos_token_id == 0
    assert len(tokenizer) == len(tokenizer.get_vocab())
    assert encode_passages(tokenizer, ["1+1=", "a"]).tolist()[-2:] == [tokenizer.convert_tokens_to_ids("a"), 0]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_every_subset(k):
    right = np.random.default_rng(0).random((20, 5)) < np.linspace(0, 1, 20)[:, None]
    expected = [np.mean([any(some) for some in itertools.combinations(row, k)]) for row in right.tolist()]
    np.testing.assert_allclose(table.pass_at_k(right, k), expected)
    assert table.powers(1) == [1] and table.powers(8) == [1, 2, 4, 8] and table.powers(11) == [1, 2, 4, 8]


def small(folder, **changes):
    """A recipe of the smallest size."""
    reinforcing = Reinforcing(
        prompts=8,
        group_size=2,
        completion_length=12,
        temperature=1.0,
        steps=2,
        learning_rate=0.03,
        options=EXPLORING,
        compare=recipe.Config.reinforce.compare,
    )
    return dataclasses.replace(
        recipe.Config(
            problems=120,
            held_out=16,
            samples=4,
            points=2,
            seeds=1,
            estimators=("dr_grpo",),
            pretrain=Pretraining(context=64, layers=1, width=16, heads=2, steps=3, batch_size=8),
            reinforce=reinforcing,
            results=folder,
        ),
        **changes,
    )


def test_held_out_problems_are_in_no_other_part(tmp_path):
    config, task, tokenizer = small(tmp_path), tasks.make_task("addition"), tasks.make_tokenizer()
    found = recipe.pose(config, task, None, tokenizer, 64)
    keys = [{each.key for each in part} for part in (found.train, found.held_out)]
    assert len(found.train) == len(keys[0]) == 104 and len(found.held_out) == len(keys[1]) == 16
    assert not keys[0] & keys[1]
    text = recipe.noisy_texts(config, task, tokenizer, found)
    passages = tokenizer.decode(text.train_tokens.tolist()).split("<|endoftext|>")[:-1]
    assert len(passages) == recipe.COPIES * 104 and len(text.held_out) == 16
    asked = [re.match(r"(\d+)\+(\d+)=", passage).groups() for passage in passages]
    assert {"+".join(sorted(pair, key=int)) for pair in asked} == keys[0]
    for prompts, mask, part in ((*found.prompts.train, found.train), (*found.prompts.held_out, found.held_out)):
        for row, real, problem in zip(prompts, mask, part, strict=True):
            assert tokenizer.decode(row[real].tolist()) == "<|endoftext|>" + problem.question
            assert found.asked[problem.question] == problem


def test_table_and_curves_are_those_of_the_completions():
    right = np.array([[True, False, False, True], [False] * 4])
    shape = right.shape
    lengths = np.arange(8.0).reshape(shape)
    one = table.Measured(right, right[:, :1], right | (lengths == 5), lengths, np.full(shape, 2.0), [])
    none = one._replace(right=~right & right, formatted=right, kl=np.zeros(shape))
    rows = table.table_rows(none, {"rloo": [[none, one], [one, none]], "grpo": [[one, one]]}, 4)
    assert [(row["policy"], row["seed"]) for row in rows] == [
        (table.BEFORE, ""), ("rloo", "0"), ("rloo", "1"), ("rloo", "all"), ("grpo", "0"),
    ]  # fmt: skip
    before, first, _, both, last = rows
    assert [first[name].value for name in ("accuracy", "greedy accuracy", "pass@2", "pass@4")] == pytest.approx(
        [2 / 8, 1 / 2, (1 - 1 / 6) / 2, 1 / 2]
    )
    assert first["format"].value == 3 / 8 and first["KL, nats"].value == 2
    assert (first["length of right"], first["length of wrong"]) == (3 / 2, 25 / 6)
    assert [before["accuracy"].value, before["length of wrong"]] == [0, 3.5] and np.isnan(before["length of right"])
    assert both["accuracy"].value == 1 / 8 and both["pass@4"].value == 1 / 4 and both["KL, nats"].value == 1
    assert both["length of right"] == 3 / 2 and both["length of wrong"] == pytest.approx(53 / 14)
    assert first | {"policy": "grpo"} == last
    points = table.curve_rows(none, {"rloo": [[none, one], [one, none]]}, 30)
    assert [(p["policy"], p["seed"], p["updates"], p["accuracy"].value) for p in points] == [
        ("rloo", seed, updates, accuracy)
        for seed, accuracies in ((0, (0, 0, 0.25)), (1, (0, 0.25, 0)))
        for updates, accuracy in zip((0, 30, 60), accuracies, strict=True)
    ]


def test_each_completion_is_checked_by_its_own_problem(tmp_path, monkeypatch):
    held_out = [tasks.Problem("", "", answer, "", "") for answer in ("ab", "cd")]
    tagged = [f"<answer>{text}</answer>" for text in ("ab", "ad", "cd")]  # of which the second is half right
    said = {2: [*tagged[:2], "cd", tagged[2]], 1: tagged[:1] * 2}

    def complete(policy, reference, prompts, rewards, sampling, key, stage):
        assert (prompts, sampling.eos, sampling.temperature) == ("held out", (7,), float(sampling.group_size == 2))
        mask = np.arange(12) < np.array([[3], [4], [1], [2]])
        rollout = Rollout(mask, mask, mask, mask, mask, mask)
        return Sampled(rollout, said[sampling.group_size], {}, np.ones((2, 2)), None)

    monkeypatch.setattr(recipe, "complete", complete)
    policy, problems = Policy({}, None, None, (7,)), recipe.Problems([], held_out, Prompts("train", "held out"), {})
    found = recipe.measure(small(tmp_path), SORTING, policy, policy, problems, 2, None)
    assert found.right.tolist() == [[True, False], [False, True]] and found.greedy.tolist() == [[True], [False]]
    assert found.formatted.tolist() == [[True, True], [False, True]] and found.lengths.tolist() == [[3, 4], [1, 2]]
    assert found.texts == said[2]


@pytest.mark.slow
def test_recipe_in_miniature(tmp_path, monkeypatch):
    def untrained(settings, text, seed, run, writer):  # pretraining has tests of its own, and takes long to compile
        config = model_config(settings)
        return Policy(init_params(jax.random.key(seed), config), config, text.tokenizer), {}

    monkeypatch.setattr(recipe, "pretrain", untrained)
    recipe.main(small(tmp_path))
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [(row["policy"], row["seed"]) for row in rows] == [(table.BEFORE, ""), ("dr_grpo", "0")]
    assert abs(rows[0]["KL, nats"]["value"]) < 1e-4 < rows[1]["KL, nats"]["value"]
    assert all(1 <= row["length of wrong"] <= 12 for row in rows)
    points = json.loads((tmp_path / "curves.json").read_text())
    assert [(p["seed"], p["updates"]) for p in points] == [(0, 0), (0, 1), (0, 2)]
    assert (tmp_path / "verifiable.png").read_bytes()[:4] == b"\x89PNG"
    assert "wrong)" in (tmp_path / "examples.md").read_text()
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["seconds"] > 0
    assert (tmp_path / "pretrained/model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "subtraction"}, "no task 'subtraction': give addition, sorting, counting"),
        ({"task": "addition:two"}, "must be a number from 1 to 9"),
        ({"task": "addition:1"}, "has about 55 problems, and 121 are asked for"),
        ({"problems": 16}, "must be above held_out, 16"),
        ({"points": 3}, "2 steps do not divide into 3 points"),
        ({"format_reward": -1.0}, "format_reward is -1"),
        ({"teacher": tasks.Teacher(doubt=1.0)}, "teacher.doubt is 1.0"),
        ({"samples": 0}, "samples is 0"),
        ({"estimators": ()}, "estimators is 0"),
        ({"estimators": ("rlo",)}, "No estimator is named 'rlo'"),
        ({"seeds": 0}, "seeds is 0"),
        ({"reinforce": dataclasses.replace(recipe.Config.reinforce, estimator="grpo")}, "reinforce.estimator has no"),
        ({"policy": Path("nowhere")}, "leave out teacher and pretrain"),
        ({"policy": Path("nowhere"), "pretrain": recipe.Config.pretrain}, "no folder nowhere"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        recipe.main(small(tmp_path / "there", **changes))
    assert not (tmp_path / "there").exists()


def test_tasks_of_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    task = tasks.make_task("reasoning_gym:chain_sum")
    found = tasks.draw_problems(task, 20, seed=0)
    assert found == tasks.draw_problems(task, 20, seed=0) and len({each.question for each in found}) == 20
    for problem in found:
        terms = re.search(r": (.*) =", problem.words)[1]
        assert problem.answer == str(sum(int(x) for x in terms.replace("- ", "+ -").split(" + ")))
        assert [task.grade(problem, x) for x in (problem.answer, f" {problem.answer} ", "no")] == [1, 1, 0]
        assert task.grade(problem, f"perhaps {problem.answer}") == 0  # which the scorer itself gives a part of
    with pytest.raises(InputError, match="propositional_logic of reasoning-gym has no answers"):
        tasks.draw_problems(tasks.make_task("reasoning_gym:propositional_logic"), 2, seed=0)
    with pytest.raises(InputError, match="no data set 'sums'"):
        tasks.make_task("reasoning_gym:sums")


def test_a_task_without_a_teacher_needs_a_policy(tmp_path):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(InputError, match="No teacher writes texts of reasoning_gym:chain_sum"):
        recipe.main(small(tmp_path / "there", task="reasoning_gym:chain_sum"))


COUNTDOWN = tasks.make_task("countdown:3")


def made_of(numbers):
    """Every value of three numbers that are each used once, where none on the way is below 0."""
    found, apply = set(), (lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b)
    for (a, b, c), first, second in itertools.product(itertools.permutations(numbers), apply, apply):
        for last in (lambda x, c=c, second=second: second(x, c), lambda x, c=c, second=second: second(c, x)):
            if first(a, b) >= 0 and last(first(a, b)) >= 0:
                found.add(last(first(a, b)))
    return found


def test_countdown_can_be_done_and_its_steps_are_true():
    for problem in problems(COUNTDOWN):
        given, target = re.fullmatch(r"([\d,]+):(\d+)=", problem.question).groups()
        numbers = sorted(int(x) for x in given.split(","))
        assert len(numbers) == 3 and 1 <= min(numbers) <= max(numbers) <= 15 and 1 <= int(target) < 100
        assert sorted(int(x) for x in re.findall(r"\d+", problem.answer)) == numbers
        assert eval(problem.answer) == int(target) in made_of(numbers)
        steps = [step.split("=") for step in problem.steps.split(",")]
        assert len(steps) == 2 and all(eval(left) == int(right) for left, right in steps)
        assert steps[-1][1] == target and given in problem.words and problem.words.endswith(f"make {target}.")
        assert problem.key == f"{','.join(map(str, numbers))}:{target}"
        assert COUNTDOWN.grade(problem, problem.answer) == 1
        other = COUNTDOWN.misread(np.random.default_rng(0), problem)
        assert COUNTDOWN.grade(other, other.answer) == 1 and COUNTDOWN.grade(problem, other.answer) == 0
        changed = [x != y for x, y in zip(*(tasks.given_numbers(each)[0] for each in (problem, other)), strict=True)]
        assert sum(changed) + (tasks.given_numbers(other)[1] != int(target)) == 1
    for numbers in ((2, 3, 7), (1, 1, 4), (5, 5, 5)):
        assert set(tasks.expressions(numbers)) == made_of(numbers)


@pytest.mark.parametrize(
    ("given", "grade"),
    [
        ("3*5+7", 1), ("7+(5*3)", 1), (" ( 7 + 5 * 3 )\n", 1), ("((3))*5+7", 1),
        ("3*(5+7)", 0), ("22", 0), ("15+7", 0), ("3*5+7+7-7", 0), ("3+5+7+7", 0), ("3*5+7=22", 0), ("", 0),
        ("3*5+7)", 0), ("(3*5+7", 0), ("3 * * 5+7", 0), ("3*5 7", 0), ("+7+3*5", 0), ("3*5--7", 0), ("()", 0),
        ("int('3')*5+7", 0), ("3*5+7 or 1", 0), ("(" * 1000 + "3*5+7" + ")" * 1000, 0), ("٣*5+7", 0),
    ],
)  # fmt: skip
def test_any_right_expression_is_right_and_nothing_else(given, grade):
    problem = tasks.Problem("5,3,7:22=", "", "(3*5)+7", "", "")
    assert (
        COUNTDOWN.grade(problem, given)
        == grade
        == tasks.grade_completion(COUNTDOWN, problem, f"<answer>{given}</answer>")
    )


@pytest.mark.parametrize("text", ["2+3*4", "10-3-2", "10-(3-2)", "2*(3+4)*5-1", "(1+2)*(3-4)", "1-2-3*4+5"])
def test_an_expression_is_read_as_it_is_everywhere(text):
    assert tasks.read_expression(text) == (eval(text), sorted(int(x) for x in re.findall(r"\d+", text)))


def test_countdown_is_taught_in_tokens_of_its_own():
    plain, tokenizer = tasks.make_tokenizer(), tasks.make_tokenizer(COUNTDOWN.signs)
    assert list(tokenizer.get_vocab().items() - plain.get_vocab().items()) and len(tokenizer) == len(plain) + 4
    assert plain.get_vocab().items() <= tokenizer.get_vocab().items()
    rng, right = np.random.default_rng(0), []
    for problem in problems(COUNTDOWN):
        text = tasks.teach(COUNTDOWN, problem, tasks.Teacher(right=0.7, untagged=0.0), rng)
        right.append(tasks.grade_completion(COUNTDOWN, problem, text))
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert np.mean(right) == pytest.approx(0.7, abs=0.1)
    for size in (1, 5):
        with pytest.raises(InputError, match=f"size of countdown is {size}"):
            tasks.make_task(f"countdown:{size}")
