"""Rewards of a user's, some of them with mistakes."""


def broken(prompt: str, completion: str) -> float:
    raise KeyError("no such word")
