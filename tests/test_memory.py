"""What a process does with the memory that it frees."""

import subprocess
import sys

import pytest

from rl_jax.run import memory

PROGRAM = """
import resource, sys
from rl_jax.run.memory import keep_freed_memory
kept = keep_freed_memory() if "keep" in sys.argv else False
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * (64 << 20)  # written once, and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(kept, faults(), faults(), faults())
"""


def run(*args):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *args], capture_output=True, text=True, check=True)
    kept, *faults = done.stdout.split()
    return kept == "True", [int(count) for count in faults]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library of Linux")
def test_freed_memory_is_used_again_without_page_faults():
    kept, faults = run("keep")
    assert kept and max(faults[1:]) < 100 < 10_000 < faults[0]
    kept, faults = run()
    assert not kept and min(faults) > 10_000


def test_elsewhere_it_does_nothing(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_freed_memory() is False
