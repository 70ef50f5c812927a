"""The loop round the mathematics: progress, metrics, checkpoints, interruption. It knows no model and no algorithm."""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from rl_jax.errors import InputError
from rl_jax.run.checkpoint import Checkpoints, save_checkpoint, wait_for_checkpoints
from rl_jax.run.interrupt import stop_requests
from rl_jax.run.machine import use_machine
from rl_jax.run.memory import keep_freed_memory
from rl_jax.run.metrics import MetricsWriter
from rl_jax.run.processes import agreed, are_several, leave, number
from rl_jax.run.progress import Progress, show_progress
from rl_jax.run.tracking import check_tracker
from rl_jax.types import TrainState

NONFINITE_LIMIT = 3  # consecutive skipped updates at which a run has failed


class Interrupted(Exception):
    """The run was asked to stop, and its state is saved. The message says how to continue."""


class RunFailed(Exception):
    """The run cannot go on. The message says why, and what is kept."""


class RewardFailed(InputError):
    """A reward on text failed.

    Attributes:
        texts: the prompts and completions that were being rewarded, rows for a file; none if they are in one already.
    """

    def __init__(self, message: str, texts: Sequence[Mapping[str, str]]) -> None:
        super().__init__(message)
        self.texts = texts


def train(
    step_fn: Callable[[TrainState, int], tuple[TrainState, Mapping[str, Any]]],
    state: TrainState,
    *,
    stage: str,
    steps: int,
    writer: MetricsWriter,
    checkpoints: Checkpoints,
    checkpoint_every: int,
    saved_at: Collection[int] = (),
    shown: Sequence[str] = ("loss", "tokens_per_second"),
) -> TrainState:
    """Runs `step_fn` from step `state.step` to step `steps`.

    The metrics of a step are fetched when the next step has been dispatched, so that the device need not wait for
    the host; where a checkpoint follows, before it. The row of metrics numbered i is that of the update from step i to
    i + 1.

    Args:
        step_fn: (state, step) -> (state, metrics): one update, and scalars by name, or functions that give one, which
            are called when the next step has been dispatched. Of these "tokens", the number of
            tokens that the step processed, is written as "tokens_per_second" by the time from one step to the next
            (null for the first step, which compiles, and for the last); "nonfinite", if there, is the number of
            updates in a row that were skipped.
            What it raises, it raises before it donates the state.
        state: where to start. It may be donated.
        stage: "pretrain", "rl": the stage's name in the metrics.
        steps: the step to end at.
        writer: takes the metrics of each step.
        checkpoints: take the state every `checkpoint_every` steps, and at the end.
        checkpoint_every: steps from one checkpoint to the next.
        saved_at: further steps to save the state at, such as those that begin with what takes long.
        shown: names of the metrics to show on the way; tokens_per_second as its average so far.

    Returns:
        The state at step `steps`.

    Raises:
        InputError: `steps` lies behind the state, or `checkpoint_every` is not positive.
        Interrupted: on SIGINT or SIGTERM, after the step under way, when its state is on disk. A second signal ends
            the run at once.
        RunFailed: three updates in a row were not finite. The checkpoints before them are kept.
        RewardFailed: a step or a metric of it raised that; the last finished state and the texts are on disk. A metric
            that failed is null in its row.
        OSError: a checkpoint or a row cannot be written. The checkpoints before it are kept.
    """
    start = int(state.step)
    if start > steps:
        raise InputError(f"{stage} is at step {start} already, and cannot end at step {steps}; ask for more steps.")
    if checkpoint_every < 1:
        raise InputError(f"checkpoint_every is {checkpoint_every}; it must be at least 1.")

    with show_progress(stage, start, steps) as progress, stop_requests(progress.say) as stop:
        record = _recorder(stage, writer, checkpoints, progress, shown)
        metrics: Mapping[str, Any] | None = None
        step, stopping = start, agreed(stop)
        try:
            while step < steps and not stopping():
                state, next_metrics = step_fn(state, step)
                step += 1
                done, metrics = metrics, next_metrics
                if done is not None:
                    record(step - 2, done)
                # After a skipped update there is nothing new to keep, and good checkpoints would go to make room.
                if (step % checkpoint_every == 0 or step in saved_at) and step < steps and not int(state.nonfinite):
                    done, metrics = metrics, None
                    record(step - 1, done)  # first: a run that is killed goes on from here, and would not write it
                    save_checkpoint(checkpoints, state)
            if step > start:
                if metrics is not None:
                    done, metrics = metrics, None
                    record(step - 1, done, last=True)
                save_checkpoint(checkpoints, state)
                wait_for_checkpoints(checkpoints)
        except RewardFailed as error:
            if metrics is not None:
                with contextlib.suppress(RewardFailed):
                    record(step - 1, metrics, last=True)
            if step > start:
                save_checkpoint(checkpoints, state)
                wait_for_checkpoints(checkpoints)
            if not error.texts:
                raise  # where it was raised, they were kept
            path = writer.keep(f"unrewarded_{stage}_{step}", error.texts)
            raise RewardFailed(_unrewarded(error, stage, step, steps, path), error.texts) from error
        except OSError as error:
            raise OSError(f"{error}. {_kept(checkpoints)} When that is mended, add --resume to continue.") from error
        stopped = stopping()
    if stopped:
        raise Interrupted(f"Stopped: {stage} is saved at step {step} of {steps}. Add --resume to continue from there.")
    return state


def run_main(main: Callable[[Any], None], config_class: type, args: Sequence[str] | None = None) -> NoReturn:
    """Reads `config_class` from the command line, sets up its `machine` and checks its `track`, if it has them, calls
    `main`, and exits.

    Each of these but 0 shows its message on standard error, without a traceback:

    - 0: done.
    - 1: the run failed, in a way that another attempt would repeat: its updates are not finite.
    - 2: a mistake of the user's, or a file that cannot be written, such as on a full disk.
    - 3: another process of the run was lost. Where JAX's runtime sees that first it ends the process itself (134 in a
      shell).
    - 130: stopped, by SIGINT (Ctrl-C) or by SIGTERM (preemption). Within `train` the state is saved first. Elsewhere
      SIGTERM ends the process as it ends any (143 in a shell), and `--resume` goes on from the last checkpoint.
    """
    import tyro

    keep_freed_memory()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    sys.unraisablehook = _show_unraisable
    try:
        config = tyro.cli(config_class, args=args)
        if hasattr(config, "machine"):
            use_machine(config.machine)
        if hasattr(config, "track"):
            check_tracker(config.track)
        main(config)
    except (InputError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        _exit(2, f"error: {error}", "bold red")
    except RunFailed as error:
        _exit(1, f"error: {error}", "bold red")
    except Interrupted as error:
        _exit(130, str(error))
    except jax.errors.JaxRuntimeError as error:
        if not are_several():
            raise
        reason = str(error).strip().splitlines()[0][:200]
        advice = "The checkpoints are whole: start all processes again, with --resume."
        _exit(3, f"error: another process of this run was lost ({reason}). {advice}", "bold red", at_once=True)
    except KeyboardInterrupt:
        _exit(130, "Stopped.", at_once=True)
    leave(0)
    sys.exit(0)


def _recorder(
    stage: str, writer: MetricsWriter, checkpoints: Checkpoints, progress: Progress, shown: Sequence[str]
) -> Callable[..., None]:
    """Returns `record(step, metrics, last=False)`, which fetches a step's metrics, writes, shows and judges them."""
    before: float | None = None  # the time at which the step before was done
    timed, seconds = 0.0, 0.0  # tokens of all steps so far that were timed, and their time

    def record(step: int, metrics: Mapping[str, Any], last: bool = False) -> None:
        nonlocal before, timed, seconds
        later = {name: value for name, value in metrics.items() if callable(value)}
        there = jax.device_get({name: value for name, value in metrics.items() if name not in later})
        row: dict[str, float | None] = {name: float(value) for name, value in there.items()}
        failure: RewardFailed | None = None
        for name, value in later.items():
            try:
                row[name] = None if failure else float(value())
            except RewardFailed as error:
                row[name], failure = None, error
        tokens, now = row.pop("tokens", None), time.perf_counter()
        if tokens is not None:
            row["tokens_per_second"] = None
            if before is not None and not last:
                row["tokens_per_second"] = tokens / (now - before)
                timed, seconds = timed + tokens, seconds + now - before
        before = now
        writer.write(stage, step, row)
        average = {"tokens_per_second": timed / seconds} if seconds else {}
        progress.show(step + 1, {name: (row | average).get(name) for name in shown})
        if skipped := int(row.get("nonfinite") or 0):
            progress.say(f"{stage} step {step}: the update was not finite and was skipped ({skipped} in a row).")
        if skipped >= NONFINITE_LIMIT:
            failed = f"{stage} failed at step {step}: {NONFINITE_LIMIT} updates in a row were not finite."
            raise RunFailed(f"{failed} {_kept(checkpoints)} Try a lower learning rate.")
        if failure is not None:
            raise failure

    return record


def _unrewarded(error: RewardFailed, stage: str, step: int, steps: int, path: Path) -> str:
    saved = f"{stage} is saved at step {step} of {steps}" if step else f"{stage} is at its beginning"
    return f"{error}. The texts are in {path}; {saved}. Mend the reward, then add --resume to continue."


def _kept(checkpoints: Checkpoints) -> str:
    with contextlib.suppress(OSError):
        wait_for_checkpoints(checkpoints)
    kept = checkpoints.manager.latest_step()
    return "There was no checkpoint yet." if kept is None else f"The last good checkpoint is kept, at step {kept}."


def _show_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    if str(unraisable.exc_value) != "Event loop is closed":  # TensorStore's, where a write beside it has failed
        sys.__unraisablehook__(unraisable)


def _exit(code: int, message: str, style: str = "", at_once: bool = False) -> NoReturn:
    """Shows a message on standard error, and exits; at once where XLA would not, which may compile or wait."""
    from rich.console import Console

    said = f"{name}: {message}" if (name := number()) else message
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(said, style=style)
    leave(code)
    if at_once:
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
