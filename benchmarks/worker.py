"""A contender: a process that gets ready, then does its work once for each line it is sent. Standard library alone.

    python benchmarks/ours.py '{"task": "generate", "shape": "A", "dtype": "float32"}'

prints one JSON object when it is ready, and one for each line read, `seconds` among it, until the input ends. What
else the libraries print goes to standard error.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Job = Callable[[], Mapping[str, Any]]
"""Does the work once, to its end (nothing still computes when it returns), and says what there is to say about it."""


def serve(tasks: Mapping[str, Callable[..., Job]]) -> None:
    """Reads the case from the command line, prepares the job that it names, warmed up, and runs it when asked."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: Mapping[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    case = json.loads(sys.argv[1])
    start = time.perf_counter()
    job = tasks[case.pop("task")](**case)
    answer({"prepared": time.perf_counter() - start})
    for _ in sys.stdin:
        start, used = time.perf_counter(), time.process_time()
        about = job()
        seconds, cpu = time.perf_counter() - start, time.process_time() - used
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answer({"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak} | dict(about))
