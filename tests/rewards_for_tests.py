"""Rewards of a user's, some of them with mistakes."""

import jax


def broken(prompt: str, completion: str) -> float:
    raise KeyError("no such word")


calls = 0


def fails_in_the_second_process(prompt: str, completion: str) -> float:
    global calls
    calls += 1
    if jax.process_index() == 1 and calls > 30:
        raise KeyError("no such word")
    return len(completion) / 10


def vowels(prompt: str, completion: str) -> float:
    return sum(letter in "aeiou" for letter in completion) / 8
