"""Stopping a run from outside: the first signal is a request, the second an order; and stopping what takes too long."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Generator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 1.0  # seconds that Python has to act on a second signal, before the process is ended from outside it


@contextlib.contextmanager
def stop_requests(say: Callable[[str], None]) -> Generator[threading.Event]:
    """Within the context, a first SIGINT or SIGTERM sets the event that is yielded and a second ends the work at once.

    The second raises KeyboardInterrupt. Python runs no handler while XLA compiles, which may take minutes; a thread
    therefore answers the first signal in words, and ends the process if the second has no effect. The handlers that
    were there before come back at the end. Away from the main thread, which alone may handle signals, nothing is done.

    Args:
        say: shows a line to the user.
    """
    stop, left = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    def watch() -> None:
        for answer in ("Stopping after this step; a second signal ends the run at once.", "Ending the run."):
            while (number := os.read(reader, 1)) and number[0] not in SIGNALS:
                pass
            if not number:
                return
            say(answer)
        if not left.wait(GRACE):
            os._exit(130)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # Python requires it, for it writes from within the C handler
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, handle) for number in SIGNALS}
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        left.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writer)
        watcher.join()
        os.close(reader)


class TimeUp(BaseException):
    """What `time_limit` raises, with its seconds. No Exception, so that code which catches those lets it by."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """Within the context, raises TimeUp after so many seconds.

    It is SIGALRM that interrupts, so this reaches what runs in Python; a call in C is interrupted when it comes back,
    if it does. Away from the main thread, and where an alarm is set already, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread() or any(signal.getitimer(signal.ITIMER_REAL)):
        yield
        return

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeUp(f"{seconds:g}")

    handler = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
