"""Pretrain a Transformer language model on unlabelled text.

    python experiments/pretrain.py --run runs/pretrain --steps 600
    python experiments/pretrain.py --corpus my_texts/ --vocab-size 8192 --width 256
    python experiments/pretrain.py --corpus my_texts/ --model runs/pretrain/policy --learning-rate 3e-5

Writes the policy, metrics, checkpoints and a report to the run's folder.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.mapped import make_sum_microbatches
from rl_jax.data.batches import held_out_batches, packed_batch
from rl_jax.data.conversations import make_render, plain_turns
from rl_jax.data.corpus import encode_passages, read_passages, split_held_out
from rl_jax.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from rl_jax.errors import InputError
from rl_jax.keys import Purpose, check_seed, step_key
from rl_jax.learner import apply_gradients, init_state, make_optimizer
from rl_jax.models.config import TransformerConfig, gpt2, llama
from rl_jax.models.huggingface import Policy, load_policy, save_policy
from rl_jax.models.layout import model_axes, put_model
from rl_jax.models.transformer import init_params
from rl_jax.pretraining import held_out_nats, pretrain_gradient
from rl_jax.run.checkpoint import close_checkpoints, open_checkpoints, restore_checkpoint
from rl_jax.run.folder import check_run, open_run
from rl_jax.run.loop import run_main, train
from rl_jax.run.machine import Machine
from rl_jax.run.metrics import MetricsWriter, open_metrics
from rl_jax.run.results import report_if_stopped, write_results
from rl_jax.run.spmd import AS_IT_IS, batch_parts, join_rows, make_mesh, pmapped, rows_here
from rl_jax.run.tracking import Tracker
from rl_jax.types import Array, Metrics, PyTree, TrainState

HELD_OUT = 0.1  # share of the passages that pretraining never sees; RL takes its prompts from them
COUNTS = ("steps", "batch_size", "microbatches", "evaluate_every", "checkpoint_every")
SHAPE = ("family", "vocab_size", "layers", "width", "heads", "kv_heads")
CURVE_BATCHES = 8  # held-out batches behind a point of the curve; the summary has them all


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Pretraining: the model, and how it is trained."""

    model: Path | None = None
    """A model to go on with, as for reinforce.py, with its own tokenizer and shape; without one, a new one is made."""
    family: Literal["llama", "gpt2"] = "llama"
    """Architecture."""
    vocab_size: int = 2048
    """Tokens of the byte-level BPE vocabulary that is learned from the corpus."""
    context: int = 128
    """Longest sequence, in tokens: a training window, or a prompt and its completion. Of a given model, only the length
    of the windows."""
    layers: int = 4
    """Blocks."""
    width: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Attention heads."""
    kv_heads: int = 0
    """Key-value heads, shared by the attention heads (Llama only); 0 means one for each head."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What activations are computed in; parameters are float32."""
    remat: bool = False
    """Recompute blocks in the backward pass: less memory, more time."""
    steps: int = 900
    """Updates."""
    batch_size: int = 8
    """Windows of text in an update, each as long as the context."""
    microbatches: int = 1
    """Parts of a batch that go through the device one after another, to save memory."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW; it decays to a tenth along a cosine. This one is for a new model: a given one would
    forget much of what it knows, and wants a hundredth of it or so."""
    warmup: int = 40
    """Updates in which the learning rate rises to its peak, if there are so many."""
    weight_decay: float = 0.1
    """Weight decay of matrices."""
    clip_norm: float = 1.0
    """Longest gradient, global L2 norm."""
    evaluate_every: int = 100
    """Updates between points of the held-out curve."""
    checkpoint_every: int = 200
    """Updates between checkpoints."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Pretrain a Transformer language model on unlabelled text."""

    pretrain: Annotated[Pretraining, tyro.conf.arg(name="")] = Pretraining()
    run: Path = Path("runs/pretrain")
    """Folder that the run writes to."""
    resume: bool = False
    """Continue the run in that folder from its last checkpoint."""
    track: Tracker | None = None
    """Send the metrics to Weights & Biases or to trackio as well."""
    corpus: str = "bbe"
    """bbe (Bible in Basic English), sotu or chitchat; a .txt, .jsonl or .parquet file, or a folder of them; or a data
    set of the hub (org/name:split)."""
    seed: int = 0
    """Seed of everything random but the held-out passages, which are the same for all seeds."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()


class Text(NamedTuple):
    """A corpus: a tokenizer, the held-out passages, and both parts as tokens [n]."""

    tokenizer: Any
    held_out: list[str]
    train_tokens: np.ndarray
    held_out_tokens: np.ndarray


def load_text(corpus: str, vocab_size: int, saved: Path | None = None, tokenizer: Any = None) -> Text:
    """Read a corpus, and train its tokenizer; or read that from the folder where it was saved, or take one."""
    render = plain_turns if tokenizer is None else make_render(tokenizer)
    train_passages, held_out = split_held_out(read_passages(corpus, render), HELD_OUT)
    if tokenizer is None:
        tokenizer = train_tokenizer(train_passages, vocab_size) if saved is None else load_tokenizer(saved)
    tokens, held_out_tokens = (encode_passages(tokenizer, part) for part in (train_passages, held_out))
    return Text(tokenizer, held_out, tokens, held_out_tokens)


def held_out_passages(corpus: str) -> list[str]:
    """The passages of a corpus that pretraining never sees."""
    return split_held_out(read_passages(corpus), HELD_OUT)[1]


def load_given(settings: Pretraining) -> Policy | None:
    """The model that the settings name, to go on with; InputError for what its own shape leaves without effect."""
    if settings.model is None:
        return None
    given = [name for name in SHAPE if getattr(settings, name) != getattr(Pretraining, name)]
    if given:
        raise InputError(f"{', '.join(given)} have no effect with model, which has its own: leave them out.")
    policy = load_policy(settings.model, settings.dtype, settings.remat)
    if settings.context > policy.config.context:
        raise InputError(
            f"context is {settings.context}; the model reads at most {policy.config.context} tokens: give no more."
        )
    return policy


def saved_tokenizer(run: Path, resume: bool) -> Path | None:
    """The folder with the tokenizer of a run to be resumed; None where that was stopped before it was saved."""
    return run / "policy" if resume and (run / "metrics.jsonl").exists() else None  # which is opened after that


def model_config(settings: Pretraining) -> TransformerConfig:
    """The model that the settings describe."""
    shape = (settings.vocab_size, settings.context, settings.layers, settings.width, settings.heads)
    compute = {"dtype": settings.dtype, "remat": settings.remat}
    if settings.family == "llama":
        return llama(*shape, kv_heads=settings.kv_heads or settings.heads, **compute)
    if settings.kv_heads:
        raise InputError("GPT-2 has no grouped key-value heads: leave out kv_heads, or take the llama family.")
    return gpt2(*shape, **compute)


def check(settings: Pretraining, text: Text, seed: int) -> None:
    """Raise InputError for settings that cannot work, before anything is trained."""
    check_training(settings, seed)
    needed = settings.batch_size * settings.context + 1
    if len(text.train_tokens) < needed:
        raise InputError(
            f"The corpus has {len(text.train_tokens)} training tokens, too short for one batch of "
            f"{settings.batch_size} windows of {settings.context} ({needed} tokens): give more text or a smaller batch."
        )


def check_training(settings: Any, seed: int) -> None:
    """Raise InputError for what every stage but RL is set to, if it cannot work."""
    check_seed(seed)
    check_optimizer(settings)
    check_counts({name: getattr(settings, name) for name in COUNTS})
    check_batch(settings.batch_size, settings.microbatches)


def check_counts(counts: dict[str, int]) -> None:
    """Raise InputError for a number below 1."""
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} is {count}; it must be at least 1.")


def check_batch(batch_size: int, microbatches: int) -> None:
    """Raise InputError for a batch that does not divide evenly."""
    parts = batch_parts(make_mesh())
    if batch_size % (microbatches * parts):
        raise InputError(
            f"A batch_size of {batch_size} does not divide into {microbatches} microbatches over {parts} devices."
        )


def check_optimizer(settings: Any) -> None:
    """Raise InputError for numbers that AdamW cannot learn with."""
    for name in ("learning_rate", "clip_norm"):
        if not 0 < getattr(settings, name) < math.inf:
            raise InputError(f"{name} is {getattr(settings, name)}; it must be a number above 0.")
    for name in ("warmup", "weight_decay"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise InputError(f"{name} is {getattr(settings, name)}; it must be a number of at least 0.")


def learning_rate(peak: float, steps: int, warmup: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to a tenth of it."""
    warmup = min(warmup, steps - 1)
    return optax.warmup_cosine_decay_schedule(peak / (warmup + 1), peak, warmup, steps, peak / 10)


def pretrain(
    settings: Pretraining, text: Text, seed: int, run: Path, writer: MetricsWriter, given: Policy | None = None
) -> tuple[Policy, dict]:
    """Pretrain a new model or the given one, or continue to: the policy, and its row of the summary."""
    config, mesh = given.config if given else model_config(settings), make_mesh()
    sum_parts = make_sum_microbatches(mesh, settings.microbatches)
    schedule = learning_rate(settings.learning_rate, settings.steps, settings.warmup)
    optimizer = make_optimizer(schedule, settings.weight_decay, settings.clip_norm, (0.9, 0.95))

    def update(state: TrainState, tokens: Array) -> tuple[TrainState, Metrics]:
        grads, metrics = pretrain_gradient(state.params, tokens, config, sum_parts)
        rate = jnp.asarray(schedule(state.step))
        state, applied = apply_gradients(state, grads, optimizer)
        return state, metrics | applied | {"learning_rate": rate, "tokens": jnp.asarray(tokens[:, 1:].size)}

    def evaluate(params: PyTree, tokens: Array, mask: Array) -> Array:
        return held_out_nats(params, tokens, mask, config)

    params = put_model(given.params, mesh) if given else init_params(step_key(seed, Purpose.INIT), config)
    state = put_model(init_state(params, optimizer, kl_coefficient=0.0), mesh)
    mapped_update = pmapped(update, mesh, (AS_IT_IS, 0), (model_axes(state, mesh), None), donate=(0,))
    mapped_evaluate = pmapped(evaluate, mesh, (AS_IT_IS, 0, 0), None)

    def held_out() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return held_out_batches(text.held_out_tokens, settings.batch_size, settings.context)

    own = rows_here(settings.batch_size, mesh)
    curve = [batch for batch, _ in zip(held_out(), range(CURVE_BATCHES), strict=False)]

    def step(state: TrainState, number: int) -> tuple[TrainState, Metrics]:
        tokens = packed_batch(text.train_tokens, settings.batch_size, settings.context, seed, number, own)
        state, metrics = mapped_update(state, join_rows(tokens, mesh))
        if (number + 1) % settings.evaluate_every == 0:
            nats = sum(mapped_evaluate(state.params, *batch) for batch in curve)
            metrics["held_out_loss"] = nats / sum(mask.sum() for _, mask in curve)
        return state, metrics

    def held_out_sum(params: PyTree) -> float:
        return sum(float(mapped_evaluate(params, *batch)) for batch in held_out())

    before = measure_text(held_out_sum(params), text) if given else {}
    checkpoints = open_checkpoints(run / "checkpoints/pretrain", dataclasses.asdict(settings))
    state = restore_checkpoint(checkpoints, state) or state
    state = train(
        step,
        state,
        stage="pretrain",
        steps=settings.steps,
        writer=writer,
        checkpoints=checkpoints,
        checkpoint_every=settings.checkpoint_every,
    )
    close_checkpoints(checkpoints)
    policy = given._replace(params=state.params) if given else Policy(state.params, config, text.tokenizer)
    size = sum(x.size for x in jax.tree.leaves(policy.params))
    summary = {"parameters": size} | measure_text(held_out_sum(state.params), text)
    return policy, summary | {f"{name}_before": value for name, value in before.items()}


def measure_text(nats: float, text: Text) -> dict[str, float]:
    """Held-out loss in every usual unit, from the nats of all held-out targets. Bytes do not count the ends of text."""
    loss = nats / (len(text.held_out_tokens) - 1)
    bytes_ = sum(len(passage.encode()) for passage in text.held_out)
    return {
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(loss),
        "held_out_bits_per_byte": nats / math.log(2) / bytes_,
    }


def main(config: Config) -> None:
    start = time.perf_counter()
    model_config(config.pretrain)  # a shape that cannot be is told at once
    check_run(config.run, config, config.resume)
    given, saved = load_given(config.pretrain), saved_tokenizer(config.run, config.resume)
    text = load_text(config.corpus, config.pretrain.vocab_size, saved, given and given.tokenizer)
    check(config.pretrain, text, config.seed)
    run = open_run(config.run, "experiments/pretrain.py", config)
    save_tokenizer(run / "policy", text.tokenizer)
    writer = open_metrics(run, config.track)
    with report_if_stopped(run):
        policy, summary = pretrain(config.pretrain, text, config.seed, run, writer, given)
    writer.close()
    save_policy(run / "policy", policy)
    write_results(run, summary | {"seed": config.seed, "seconds": time.perf_counter() - start})


if __name__ == "__main__":
    run_main(main, Config)
