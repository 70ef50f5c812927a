"""The problems of the recipe `verifiable`: drawn from a seed, with answers that can be checked; and who teaches them.

A task is pure functions of a random generator. Its problems are told apart by a key, so that what is held out is not
in another guise among the rest: 37 + 48 and 48 + 37 are one problem.
"""

import dataclasses
import functools
import importlib.util
import itertools
import re
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rl_jax.data.tokenizer import END_OF_TEXT
from rl_jax.errors import InputError

OPEN, CLOSE = "<answer>", "</answer>"
NO_TAG = rf"(?:(?!{OPEN}|{CLOSE}).)*"
FORMAT = re.compile(rf"{NO_TAG}{OPEN}({NO_TAG}){CLOSE}\s*", re.DOTALL)
DOUBT = "?"  # between an attempt and the next
LETTERS, FEW_LETTERS = string.ascii_lowercase, "abcd"  # to sort, and to count
CHARACTERS = string.digits + string.ascii_lowercase + "+=:," + DOUBT
SIGNS = "-*()"  # of an expression, besides what is among CHARACTERS
LONGEST = 200  # characters of an expression that is read
TRIES = 50  # draws for each problem that is asked for, before a task is taken to have no more
GYM = "reasoning_gym"


class Problem(NamedTuple):
    """A question with one answer.

    Attributes:
        question: as a small policy is asked it.
        words: as a policy is asked it that knows English.
        answer: the right one.
        steps: that lead to it; nothing where nobody writes them.
        key: the same for problems that are the same but for the order of what is given.
    """

    question: str
    words: str
    answer: str
    steps: str
    key: str


class Task(NamedTuple):
    """Problems of one kind.

    Attributes:
        draw: random generator -> a problem.
        misread: random generator, problem -> one that is read wrongly, with another answer; None where no teacher is.
        grade: problem, the answer that was given -> from 0 to 1, which is right.
        signs: characters of its texts that other tasks have no tokens for.
    """

    draw: Callable[[np.random.Generator], Problem]
    misread: Callable[[np.random.Generator, Problem], Problem] | None
    grade: Callable[[Problem, str], float]
    signs: str = ""


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Who writes the texts of pretraining: one who is often wrong, and then more often long."""

    right: float = 0.6
    """Share of the texts whose answer is right; the others answer a problem that was read wrongly."""
    untagged: float = 0.1
    """Share that does not put its answer between the tags."""
    brief: float = 0.3
    """Share of the attempts that have no steps."""
    doubt: float = 0.15
    """Chance that a right text makes a wrong attempt before, and another before that, and so on."""
    doubt_if_wrong: float = 0.4
    """The same of a wrong text."""


def addition(digits: int) -> Task:
    """Sums of two numbers of so many digits at most; the steps are the columns, from the right."""

    def problem(a: int, b: int) -> Problem:
        columns, carry = [], 0
        for place in range(max(len(str(a)), len(str(b)))):
            x, y = a // 10**place % 10, b // 10**place % 10
            total = x + y + carry
            columns.append("+".join([*(["1"] if carry else []), str(x), str(y)]) + f"={total}")
            carry = total // 10
        least, most = sorted((a, b))
        return Problem(f"{a}+{b}=", f"What is {a} + {b}?", str(a + b), ",".join(columns), f"{least}+{most}")

    def draw(rng: np.random.Generator) -> Problem:
        return problem(*(int(x) for x in rng.integers(10**digits, size=2)))

    def misread(rng: np.random.Generator, right: Problem) -> Problem:
        numbers = [int(x) for x in right.question.removesuffix("=").split("+")]
        which, place = rng.integers(2), rng.integers(digits)
        digit = numbers[which] // 10**place % 10
        numbers[which] += int((digit + rng.integers(1, 10)) % 10 - digit) * 10 ** int(place)
        return problem(*numbers)

    return Task(draw, misread, exact)


def sorting(letters: int) -> Task:
    """So many different letters in the order of the alphabet; the steps insert one after another."""

    def problem(given: Sequence[str]) -> Problem:
        steps = ",".join("".join(sorted(given[:n])) for n in range(1, len(given)))
        answer = "".join(sorted(given))
        return Problem("".join(given) + ":", f"Sort these letters: {' '.join(given)}", answer, steps, answer)

    def draw(rng: np.random.Generator) -> Problem:
        return problem([LETTERS[i] for i in rng.permutation(len(LETTERS))[:letters]])

    def misread(rng: np.random.Generator, right: Problem) -> Problem:
        given = list(right.question.removesuffix(":"))
        others = sorted(set(LETTERS) - set(given))
        given[rng.integers(letters)] = others[rng.integers(len(others))]
        return problem(given)

    return Task(draw, misread, share_in_place)


def counting(letters: int) -> Task:
    """How often a letter occurs in a word of up to so many; the steps count along the word."""

    def problem(letter: str, word: str) -> Problem:
        steps = "".join(f"{x}{word[: n + 1].count(letter)}" for n, x in enumerate(word))
        asked = f"How many times is the letter {letter} in {word}?"
        return Problem(f"{letter}:{word}=", asked, str(word.count(letter)), steps, f"{letter}:{word}")

    def draw(rng: np.random.Generator) -> Problem:
        letter, *word = (FEW_LETTERS[i] for i in rng.integers(len(FEW_LETTERS), size=rng.integers(2, letters + 2)))
        return problem(letter, "".join(word))

    def misread(rng: np.random.Generator, right: Problem) -> Problem:
        letter, word = right.question[0], right.question[2:-1]
        others, place = FEW_LETTERS.replace(letter, ""), rng.integers(len(word))
        now = others[rng.integers(len(others))] if word[place] == letter else letter
        return problem(letter, word[:place] + now + word[place + 1 :])

    return Task(draw, misread, exact)


def countdown(count: int) -> Task:
    """So many numbers up to 15, and a target below 100 that they make: each is used once, with + - * and brackets.

    It is TinyZero's, in small. The steps are the operations; any right expression is a right answer.

    Raises:
        InputError: there are not 2 to 4 numbers.
    """
    if not 2 <= count <= 4:
        raise InputError(f"The size of countdown is {count}; give 2, 3 or 4 numbers.")

    def problem(numbers: Sequence[int], target: int) -> Problem:
        answer, steps = expressions(tuple(sorted(numbers)))[target]
        given, ordered = (",".join(str(x) for x in each) for each in (numbers, sorted(numbers)))
        words = f"Use each of the numbers {given} once, with + - * and brackets, to make {target}."
        return Problem(f"{given}:{target}=", words, answer, steps, f"{ordered}:{target}")

    def pick_target(rng: np.random.Generator, numbers: Sequence[int]) -> int:
        targets = [x for x in expressions(tuple(sorted(numbers))) if 1 <= x < 100]
        return targets[rng.integers(len(targets))]

    def draw(rng: np.random.Generator) -> Problem:
        numbers = [int(x) for x in rng.integers(1, 16, size=count)]
        return problem(numbers, pick_target(rng, numbers))

    def misread(rng: np.random.Generator, right: Problem) -> Problem:
        given, wanted = given_numbers(right)
        while True:  # a number or the target is misread, until there is an answer to that
            numbers, target = list(given), wanted
            if rng.random() < 0.5:
                numbers[rng.integers(count)] = int(rng.integers(1, 16))
            else:
                target = pick_target(rng, numbers)
            if (sorted(numbers), target) != (sorted(given), wanted) and target in expressions(tuple(sorted(numbers))):
                return problem(numbers, target)

    def grade(problem: Problem, given: str) -> float:
        numbers, target = given_numbers(problem)
        return float(read_expression(given) == (target, sorted(numbers)))

    return Task(draw, misread, grade, SIGNS)


def given_numbers(problem: Problem) -> tuple[list[int], int]:
    """The numbers and the target of a problem of `countdown`."""
    numbers, target = problem.question.removesuffix("=").split(":")
    return [int(x) for x in numbers.split(",")], int(target)


@functools.cache
def expressions(numbers: tuple[int, ...]) -> dict[int, tuple[str, str]]:
    """What numbers make that are each used once: every value not below 0, its first expression found, and the steps."""
    if len(numbers) == 1:
        return {numbers[0]: (str(numbers[0]), "")}
    found: dict[int, tuple[str, str]] = {}
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            parts = [tuple(x for i, x in enumerate(numbers) if (i in chosen) == first) for first in (True, False)]
            left, right = (expressions(part).items() for part in parts)
            for (a, (first, before)), (b, (second, after)) in itertools.product(left, right):
                for sign, value in (("+", a + b), ("-", a - b), ("*", a * b)):
                    text = sign.join(x if x.isdigit() else f"({x})" for x in (first, second))
                    steps = ",".join(filter(None, (before, after, f"{a}{sign}{b}={value}")))
                    if value >= 0:
                        found.setdefault(value, (text, steps))
    return found


def read_expression(text: str) -> tuple[int, list[int]] | None:
    """The value of an expression of whole numbers, + - * and brackets, and its numbers in order; None if it is none.

    Signs stand between two operands, and the text is no longer than 200 characters.
    """
    if len(text) > LONGEST or not re.fullmatch(r"[0-9+\-*()\s]*", text):
        return None
    tokens = re.findall(r"[0-9]+|[+\-*()]", text)[::-1]  # the next is the last
    numbers: list[int] = []

    def operand() -> int:
        token = tokens.pop()
        if token == "(":
            value = terms()
            if tokens.pop() != ")":
                raise ValueError
            return value
        numbers.append(int(token))
        return numbers[-1]

    def product() -> int:
        value = operand()
        while tokens and tokens[-1] == "*":
            tokens.pop()
            value *= operand()
        return value

    def terms() -> int:
        value = product()
        while tokens and tokens[-1] in "+-":
            value += product() if tokens.pop() == "+" else -product()
        return value

    try:
        value = terms()
    except (IndexError, ValueError):  # it ended too early, or had a sign where an operand belongs
        return None
    return None if tokens else (value, sorted(numbers))


def exact(problem: Problem, given: str) -> float:
    """1 for the answer itself, white space around it aside; else 0."""
    return float(given.strip() == problem.answer)


def share_in_place(problem: Problem, given: str) -> float:
    """Share of the places where the answer's letter is, of as many as the longer of the two has."""
    letters = "".join(given.split())
    same = sum(x == y for x, y in zip(letters, problem.answer, strict=False))
    return same / max(len(letters), len(problem.answer))


def gym_task(name: str) -> Task:
    """A data set of reasoning-gym, with its own settings; its scorer's part marks count for nothing.

    Raises:
        InputError: the package or the data set is missing, or its problems have no answer that could be checked.
    """
    if importlib.util.find_spec(GYM) is None:
        raise InputError(f"The tasks {GYM}:NAME are in the package reasoning-gym: pip install reasoning-gym==0.1.25")
    from reasoning_gym.factory import DATASETS, create_dataset  # pyrefly: ignore[missing-import]

    if name not in DATASETS:
        raise InputError(f"reasoning-gym has no data set {name!r}; it has {', '.join(sorted(DATASETS))}.")
    entries: dict[str, tuple[Any, dict]] = {}

    def draw(rng: np.random.Generator) -> Problem:
        data = create_dataset(name, size=1, seed=int(rng.integers(2**31)))
        entry = data[0]
        question, answer = entry["question"], entry["answer"]
        if not isinstance(answer, str) or data.score_answer(answer, entry) < 1:
            raise InputError(f"The data set {name} of reasoning-gym has no answers of its own to check against.")
        entries[question] = data, entry
        return Problem(question, question, answer, "", question)

    def grade(problem: Problem, given: str) -> float:
        data, entry = entries[problem.key]
        return float(data.score_answer(given.strip(), entry) >= 1)

    return Task(draw, None, grade)


OWN = {  # and the size of each
    "addition": (addition, 2),
    "sorting": (sorting, 5),
    "counting": (counting, 7),
    "countdown": (countdown, 3),
}


def make_task(name: str) -> Task:
    """The task of a name: addition, sorting, counting or countdown, with a size or without, or reasoning_gym:NAME."""
    kind, _, rest = name.partition(":")
    if kind == GYM:
        return gym_task(rest)
    if kind not in OWN:
        raise InputError(f"There is no task {name!r}: give {', '.join(OWN)}, or {GYM}:NAME.")
    make, size = OWN[kind]
    if rest and not (rest.isdigit() and 1 <= int(rest) <= 9):
        raise InputError(f"The size of {name} must be a number from 1 to 9, as in {kind}:{size}.")
    return make(int(rest or size))


def draw_problems(task: Task, count: int, seed: int) -> list[Problem]:
    """So many problems, no two with the same key.

    Raises:
        InputError: the task has too few.
    """
    rng, found = np.random.default_rng([seed, 0]), dict[str, Problem]()
    for _ in range(TRIES * count):
        if len(found) == count:
            break
        problem = task.draw(rng)
        found.setdefault(problem.key, problem)
    if len(found) < count:
        raise InputError(f"The task has about {len(found)} problems, and {count} are asked for: give a larger size.")
    return list(found.values())


def parse_answer(completion: str) -> str | None:
    """What stands between the tags; None where these are not there once, or where anything but space comes after."""
    found = FORMAT.fullmatch(completion)
    return found and found[1]


def grade_completion(task: Task, problem: Problem, completion: str) -> float:
    """The grade of the answer, from 0 to 1; 0 where the format is not kept."""
    given = parse_answer(completion)
    return 0.0 if given is None else task.grade(problem, given)


def teach(task: Task, problem: Problem, teacher: Teacher, rng: np.random.Generator) -> str:
    """A completion as the teacher writes it: attempts, each doubted but the last, and the answer of that one."""
    assert task.misread is not None, "the caller saw that there is a teacher"
    right = rng.random() < teacher.right
    misread = functools.partial(task.misread, rng, problem)
    attempts = [problem if right else misread()]
    while rng.random() < (teacher.doubt if right else teacher.doubt_if_wrong):
        attempts.insert(0, misread())
    if rng.random() < teacher.brief:
        attempts = [each._replace(steps="") for each in attempts]
    shown = [each.steps or each.answer for each in attempts[:-1]] + [attempts[-1].steps]
    answer = attempts[-1].answer
    return DOUBT.join(shown) + (answer if rng.random() < teacher.untagged else f"{OPEN}{answer}{CLOSE}")


def make_tokenizer(signs: str = "") -> PreTrainedTokenizerFast:
    """A vocabulary in which each digit, letter, sign and tag is a token, a task's own signs too; end of text is 0."""
    tokens = [END_OF_TEXT, OPEN, CLOSE, *CHARACTERS, *signs]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, END_OF_TEXT))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT])
    backend.add_tokens([OPEN, CLOSE])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False)
