"""How a stage shows itself: a bar in a terminal, elsewhere a line every tenth of the way."""

import contextlib
import datetime
import time
from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple

REFRESHES = 2  # a second
LINES = 10  # a stage


class Progress(NamedTuple):
    """What `show_progress` yields.

    Attributes:
        show: (number of steps done, metrics by name) -> None; called at each step, it shows some.
        say: shows a line of text.
    """

    show: Callable[[int, Mapping[str, float | None]], None]
    say: Callable[[str], None]


@contextlib.contextmanager
def show_progress(stage: str, start: int, steps: int) -> Generator[Progress]:
    """Shows on standard output how a stage gets on from step `start` to `steps`, and when it will be there."""
    from rich import progress
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[metrics]}"),
        console=console,
        refresh_per_second=REFRESHES,
        disable=not console.is_terminal,
    )
    task = bar.add_task(stage, total=steps, completed=start, metrics="")
    begun = time.perf_counter()

    def show(done: int, metrics: Mapping[str, float | None]) -> None:
        if console.is_terminal:
            bar.update(task, completed=done, metrics=describe(metrics))
        elif done * LINES // steps > (done - 1) * LINES // steps:
            left = (time.perf_counter() - begun) / (done - start) * (steps - done)
            console.print(
                f"{stage} {done}/{steps}  {describe(metrics)}  {datetime.timedelta(seconds=round(left))} left"
            )

    with bar:
        yield Progress(show, console.print)


def describe(metrics: Mapping[str, float | None]) -> str:
    """Metrics in a phrase, such as "loss 3.214  tokens/s 12,346"; None is left out."""
    return "  ".join(
        f"{name.replace('_per_second', '/s')} {f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.4g}'}"
        for name, value in metrics.items()
        if value is not None
    )
