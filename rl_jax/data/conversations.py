"""What a row of a file says of a prompt and its completions, strings or lists of messages, as text.

A message is {"role": "user", "content": "Hello"}. Its text is made by a function, the tokenizer's chat template or
plain lines, so that the text of a conversation is that of its prompt with that of the completion after it.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from rl_jax.data.files import HALF_SURROGATE, SURROGATE, Row
from rl_jax.errors import InputError

T = TypeVar("T")

Message = Mapping[str, Any]
"""{"role": ..., "content": ...}, and whatever else a chat template reads."""

Render = Callable[[Sequence[Message], bool], str]
"""Messages, and whether the assistant's turn is to be opened after them, so that a completion can follow -> text."""


class BrokenRow(Exception):
    """A row that cannot be used. The message says why, and follows the row's place."""


def usable_rows(path: Path, rows: Iterable[Row], read: Callable[[Row], T]) -> tuple[list[T], list[str]]:
    """What is read of the rows of a file, and a line on each that cannot be used: "FILE, line 7 has no string ...".

    Raises:
        InputError: none can be used.
    """
    usable, broken = [], []
    for row in rows:
        try:
            if row.broken:
                raise BrokenRow(row.broken)
            usable.append(read(row))
        except BrokenRow as error:
            broken.append(f"{row.place} {error}")
    if not usable:
        why = f"; the first of {len(broken)}: {broken[0]}" if broken else ""
        raise InputError(f"{path} has no row that can be used{why}")
    return usable, broken


def plain_turns(messages: Sequence[Message], open_turn: bool) -> str:
    """A line for each turn: "user: Hello", and "assistant:" where the turn is to be opened."""
    lines = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n".join([*lines, "assistant:"] if open_turn else lines)


def make_render(tokenizer: PreTrainedTokenizerBase) -> Render:
    """The tokenizer's chat template, or `plain_turns` where it has none.

    What a template puts after the last turn, white space and the end-of-sequence token, is left out: whoever encodes
    the text puts one such token there.
    """
    if not tokenizer.chat_template:
        return plain_turns
    end = tokenizer.eos_token or ""

    def render(messages: Sequence[Message], open_turn: bool) -> str:
        turns = [dict(message) for message in messages]
        try:
            text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=open_turn))
        except Exception as error:  # a template is a program of somebody else's
            raise BrokenRow(f"is refused by the tokenizer's chat template: {error}") from error
        return text if open_turn else text.rstrip().removesuffix(end)

    return render


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token that the chat template puts after an assistant's turn; None where it puts none there."""
    if not tokenizer.chat_template:
        return None
    said = "☃"
    try:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
        after = make_render(tokenizer)(turns, False).rpartition(said)[2].lstrip()
    except BrokenRow:
        return None
    ids = tokenizer(after or tokenizer.eos_token or "", add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def read_conversation(messages: object, render: Render) -> str:
    """The text of a whole conversation; a BrokenRow where it is none."""
    return render(_messages(messages, "messages"), False)


def read_prompt(values: Mapping[str, Any], render: Render, as_chat: bool = False) -> tuple[str, str, str]:
    """The prompt of a row with the column `prompt`, a string or messages, or `messages`.

    Of `messages` the last is left out where it is the assistant's. After messages the assistant's turn is opened.

    Args:
        values: the row.
        render: messages -> text.
        as_chat: whether a string is the content of a user's message.

    Returns:
        Its text; what the user said last in it, or the string; and the whole of it for people, a line for each turn,
        or the string.

    Raises:
        BrokenRow: there is no prompt, or it is empty, or no text.
    """
    prompt = values.get("prompt")
    if isinstance(prompt, str):
        if not read_string(prompt, "prompt"):
            raise BrokenRow('has an empty "prompt"')
        return render([{"role": "user", "content": prompt}], True) if as_chat else prompt, prompt, prompt
    if prompt is None and values.get("messages") is not None:
        turns = _messages(values["messages"], "messages")
        turns = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    elif prompt is not None:
        turns = _messages(prompt, "prompt")
    else:
        raise BrokenRow('has neither "prompt" nor "messages"')
    if not turns or turns[-1]["role"] == "assistant":
        raise BrokenRow("has no message for the assistant to answer at its end")
    asked = next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), turns[-1]["content"])
    return render(turns, True), asked, turns[0]["content"] if len(turns) == 1 else plain_turns(turns, False)


def read_completion(values: Mapping[str, Any], name: str, render: Render) -> tuple[str, tuple[str, ...]]:
    """The prompt and the one completion of a row with the columns `prompt` (or none) and `name`, or `messages`.

    Of `messages` the last is the completion, and those before it are the prompt.
    """
    if values.get(name) is not None:
        return read_completions(values, {name: values[name]}, render)
    messages = _messages(values["messages"], "messages")
    return _conversation(messages[:-1], [messages[-1:]], ["messages"], render)


def read_completions(
    values: Mapping[str, Any], candidates: Mapping[str, Any], render: Render
) -> tuple[str, tuple[str, ...]]:
    """The prompt of a row and its candidate completions, as text.

    Args:
        values: the row, with the column `prompt` or without: a string or messages.
        candidates: each completion by the name it has in messages: all strings, or all lists of messages. Where all
            of these begin with the prompt they are whole conversations, and what comes after it are the completions;
            without a prompt it is what they begin with in common.
        render: messages -> text.

    Raises:
        BrokenRow: something is missing, of the wrong type, empty, or no text.
    """
    prompt = values.get("prompt")
    if any(isinstance(candidate, list) for candidate in candidates.values()):
        conversations = [_messages(candidate, name) for name, candidate in candidates.items()]
        if prompt is None:  # each keeps its last message for itself
            said = zip(*(_said(conversation[:-1]) for conversation in conversations), strict=False)
            same = itertools.takewhile(lambda turn: len(set(turn)) == 1, said)
            shared = conversations[0][: len(list(same))]
        else:
            shared = _messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, "prompt")
        if all(_said(conversation[: len(shared)]) == _said(shared) for conversation in conversations):
            conversations = [conversation[len(shared) :] for conversation in conversations]
        return _conversation(shared, conversations, list(candidates), render)
    completions = tuple(read_string(candidate, name) for name, candidate in candidates.items())
    if isinstance(prompt, list):
        turns: list[list[Message]] = [[{"role": "assistant", "content": completion}] for completion in completions]
        return _conversation(_messages(prompt, "prompt"), turns, list(candidates), render)
    for name, completion in zip(candidates, completions, strict=True):
        if not completion:
            raise BrokenRow(f'has an empty "{name}"')
    return "" if prompt is None else read_string(prompt, "prompt"), completions


def _conversation(
    prompt: list[Message], completions: Sequence[list[Message]], names: Sequence[str], render: Render
) -> tuple[str, tuple[str, ...]]:
    for name, completion in zip(names, completions, strict=True):
        if not any(str(message["content"]) for message in completion):
            raise BrokenRow(f'has an empty "{name}"')
    opened = all(completion[0]["role"] == "assistant" for completion in completions)
    before = render(prompt, opened) if prompt else ""
    texts = [render([*prompt, *completion], False) for completion in completions]
    if not all(text.startswith(before) and len(text) > len(before) for text in texts):
        raise BrokenRow("has a prompt whose text is not what the text of the whole conversation begins with")
    return before, tuple(text[len(before) :] for text in texts)


def _said(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


def _messages(value: object, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BrokenRow(f'has no messages under "{name}"')
    for number, message in enumerate(value, start=1):
        for field in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(field), str):
                raise BrokenRow(f'has no string under "{field}" of message {number} of "{name}"')
            read_string(message[field], field)
    return value


def read_string(value: object, name: str) -> str:
    """The value of a column that holds text; a BrokenRow where it does not."""
    if not isinstance(value, str):
        raise BrokenRow(f'has no string under "{name}"')
    if SURROGATE.search(value):
        raise BrokenRow(HALF_SURROGATE)
    return value
