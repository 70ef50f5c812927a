"""The benchmarks' pure parts: ratios and who counts, the load of others, the limit's counts, and a contender's life."""

import json
import sys
import textwrap
import time

import pytest

from benchmarks import growth, limit, race, races, report
from benchmarks.run import Config, chosen
from benchmarks.work import FIXED, SHAPES, Shape, Work, random_prompts, random_windows
from rl_jax.errors import InputError

TINY = Shape(layers=2, width=128, heads=2, vocab_size=1000)
SHORT = Work(prompts=3, group_size=2, prompt_length=5, length=7)


def rounds(*pairs):
    """Rounds of (our seconds, our load, their seconds, their load)."""
    return [
        {
            races.OURS: race.Run(a, b, {"tokens": 100, "peak_mib": 1.0}),
            "peer": race.Run(c, d, {"tokens": 100, "peak_mib": 2.0}),
        }
        for a, b, c, d in pairs
    ]


def test_others_load_is_what_neither_idles_nor_is_ours():
    ticks = 2 / race.TICKS  # one for each core, which may be nobody's
    assert race.others_load(machine=3.0 + ticks, own=2.5, wall=5.0, cores=2) == pytest.approx(0.05)
    assert race.others_load(machine=2.0, own=2.01, wall=5.0, cores=2) == 0, "clocks tick"


def test_busy_time_leaves_out_idling_and_waiting_for_disks():
    line = "cpu  100 20 30 100000 5000 4 6 40 7 8"
    assert race.busy_seconds(line) == pytest.approx((100 + 20 + 30 + 4 + 6 + 40) / race.TICKS)


def test_a_pair_that_others_disturbed_in_either_run_is_left_out_and_counted():
    done = rounds((1, 0, 2, 0), (1, 0.06, 9, 0), (1, 0, 9, 0.051), (2, 0.05, 6, 0), (1, 0, 4, 0))
    found = race.compare(done, races.OURS, "peer")
    assert found.ratio == pytest.approx((3, 2.5, 3.5))
    assert found.extremes == (2, 4)
    assert (found.ours, found.peer, found.kept, found.spoilt) == (1, 4, 3, 2)


def test_ratios_are_taken_within_rounds():
    # Everything takes three times as long in the second round: the ratio of medians would be 6 / 2.
    found = race.compare(rounds((1, 0, 2, 0), (3, 0, 6, 0), (2, 0, 6, 0)), races.OURS, "peer")
    assert found.ratio is not None and found.ratio[0] == 2


def test_no_pair_that_counts_has_no_ratio():
    assert race.compare(rounds((1, 1, 2, 1)), races.OURS, "peer") == race.Comparison(None, None, None, None, 0, 1)
    assert race.spread([3.0]) == (3, 3, 3)


def test_rounds_come_back_from_json():
    done = rounds((1, 0, 2, 0), (3, 0.5, 4, 0))
    assert race.rounds_of(json.loads(json.dumps(race.summary(done)))) == done


def test_flops_of_a_forward_pass_are_two_a_weight_and_token():
    gemms = limit.forward(TINY, sequences=3, length=11, scored=4)
    blocks, head = 2 * 12 * 128 * 128, 128 * 1000
    attention = 2 * 2 * (3 * 2) * 11 * 11 * 64 * 2  # two products for each pair of places, head and layer
    flops = sum(2 * b * m * k * n * count for (b, m, k, n), count in gemms.items())
    assert flops == 2 * 3 * 11 * blocks + 2 * 4 * head + attention
    assert limit.weights(TINY) == blocks + head
    back = limit.backward(gemms)
    assert sum(2 * b * m * k * n * count for (b, m, k, n), count in back.items()) == 2 * flops


def test_the_limit_by_hand():
    parts = limit.generation_parts(TINY, SHORT)
    rates = dict.fromkeys(limit.shapes_of(parts), 1e9)
    weights = 2 * 12 * 128 * 128 + 128 * 1000
    attention = 2 * 2 * (3 * 2) * 5 * 5 * 64 * 2
    prefill = (2 * 3 * 5 * 2 * 12 * 128 * 128 + 2 * 3 * 128 * 1000 + attention) / 1e9
    computing = 6 * 2 * 6 * weights / 1e9  # 6 steps of 6 sequences
    found = limit.floor(parts, rates, bandwidth=1e12)
    assert found == pytest.approx({"prefill": prefill, "decode": computing, "total": prefill + computing})
    cache = 2 * 6 * (5 + 7 / 2) * 2 * 128
    reading = 6 * 4 * (weights + cache) / 1e6
    assert limit.floor(parts, rates, bandwidth=1e6)["decode"] == pytest.approx(reading)
    half = limit.floor(limit.generation_parts(TINY, SHORT, number_bytes=2), rates, bandwidth=1e6)
    assert half["decode"] == pytest.approx(reading / 2)


def test_an_rl_step_is_generation_and_four_passes_and_an_update():
    parts = {part.name: part for part in limit.rl_step_parts(TINY, SHORT)}
    assert list(parts) == ["prefill", "decode", "reference", "policy forward", "policy backward", "adamw"]
    assert parts["decode"].repeats == 6
    assert (1, 6 * 11, 128, 384) in parts["reference"].gemms and (1, 6 * 7, 128, 1000) in parts["reference"].gemms
    assert parts["adamw"] == limit.Part("adamw", {}, 8 * 4 * limit.weights(TINY))


def test_the_better_library_counts():
    slow = {"rates": [[1, 2, 3, 4, 5.0], [1, 1, 1, 1, 9.0]], "bandwidth": 7.0}
    fast = {"rates": [[1, 2, 3, 4, 6.0], [1, 1, 1, 1, 8.0]], "bandwidth": 6.0}
    assert limit.best_rates([slow, fast]) == ({(1, 2, 3, 4): 6.0, (1, 1, 1, 1): 9.0}, 7.0)


TOY = """
import sys, time
sys.path.insert(0, {root!r})
from benchmarks.worker import serve

def count(start):
    numbers = iter(range(start, start + {runs}))
    def job():
        print("noise on standard output")
        time.sleep(0.01)
        return {{"number": next(numbers)}}
    print("noise while it prepares")
    return job

serve({{"count": count}})
"""


@pytest.fixture
def toy(tmp_path):
    def make(case, runs=100):
        path = tmp_path / "toy.py"
        path.write_text(textwrap.dedent(TOY.format(root=str(race.ROOT), runs=runs)))
        return race.Contender("toy", sys.executable, str(path), case)

    return make


def test_a_contender_runs_once_for_each_line(toy):
    worker = race.start(toy({"task": "count", "start": 5}))
    runs = [race.run_once(worker) for _ in range(3)]
    used = race.process_seconds(worker.process.pid)
    time.sleep(0.1)
    assert race.process_seconds(worker.process.pid) == used, "it waits without computing"
    race.stop(worker)
    assert worker.prepared["prepared"] >= 0
    assert [run.about["number"] for run in runs] == [5, 6, 7]
    assert all(run.seconds >= 0.01 and run.about["peak_mib"] > 1 for run in runs)
    assert worker.process.returncode == 0


def test_a_contender_that_fails_says_why(toy):
    with pytest.raises(race.ContenderFailed, match="KeyError: 'other'"):
        race.start(toy({"task": "other"}))
    worker = race.start(toy({"task": "count", "start": 0}, runs=1))
    race.run_once(worker)
    with pytest.raises(race.ContenderFailed, match="StopIteration"):
        race.run_once(worker)
    race.stop(worker)


def scripted(monkeypatch, loads):
    """Runs that take no time, with the loads given, in the order in which they are asked for."""
    asked = []

    def run_once(worker):
        asked.append(worker)
        return race.Run(1.0, loads[len(asked) - 1] if len(asked) <= len(loads) else 0.0, {})

    monkeypatch.setattr(race, "run_once", run_once)
    return asked


def test_rounds_turn_the_order_and_make_up_for_spoilt_pairs(monkeypatch):
    asked = scripted(monkeypatch, [0.0, 0.0, 0.5])
    assert len(race.run_rounds({"a": "A", "b": "B"}, 3, [("a", "b")])) == 4
    assert asked == ["A", "B", "B", "A", "A", "B", "B", "A"]
    scripted(monkeypatch, [1.0] * 99)
    assert len(race.run_rounds({"a": "A"}, 3, [("a", "a")])) == 6, "twice the rounds at most"


def test_rows_of_a_race():
    found = {
        "what": "RL step, A",
        "runs": race.summary(
            [{**done, "TRL RLOO": done["peer"]} for done in rounds((1, 0, 4, 0), (1, 0, 2, 0), (1, 0.5, 1, 0))]
        ),
        "left_out": {"somebody": "not installed"},
        "floor": {"decode": 0.3, "total": 0.5},
        "measured_by": ["JAX"],
    }
    del found["runs"]["peer"]
    row, absent, floor = report.race_rows("rl_step.A.rloo", found)
    assert row["ratio"] == pytest.approx((3, 2.5, 3.5)) and row["target"] == "at least 3" and row["met"] is True
    assert (row["pairs"], row["spoilt"], row["ours, tokens/s"]) == (2, 1, 100)
    assert absent["notes"] == "not measured: not installed"
    assert floor["ratio"] == (0.5, 0.5, 0.5) and floor["theirs, s"] == 0.5 and floor["target"] is None


def test_rows_of_startup():
    about = {"programs": 9, "compiled": 2, "later_programs": 0}
    cold = {"seconds": [11.0, 9.0, 12.0], "median": 11.0, "spoilt": 1} | about
    rows = report.startup_rows({"cold": cold, "cached": cold | {"seconds": [3.0], "median": 3.0}})
    assert [row["met"] for row in rows] == [False, True]
    assert rows[0]["notes"] == "2 of 9 programs compiled; in two more steps none"


def test_every_target_names_a_race_that_there_is():
    for name, peer in races.TARGETS:
        race_of = races.RACES[name]
        assert race_of.limit if peer == "the limit" else peer in race_of.peers


def test_parts_are_chosen_by_the_beginning_of_their_names():
    assert chosen(Config(only=("rl_step.A", "startup"))) == [
        "rl_step.A.rloo",
        "rl_step.A.grpo",
        "rl_step.A.tunix",
        "rl_step.A.spread",
        "startup",
    ]
    assert chosen(Config(quick=True)) == ["generation.A.float32", "rl_step.A.rloo", "pretraining.A.float32"]
    with pytest.raises(InputError, match=r"No part's name begins with 'sleep'"):
        chosen(Config(only=("sleep",)))


def test_collectives_are_counted_in_a_program_as_xla_writes_it():
    program = """\
HloModule jit_step

%body (p: (f32[2])) -> (f32[2]) {
  %all-gather.1 = s32[8,4]{1,0} all-gather(%x), dimensions={0}
}

ENTRY %main (p: f32[2]) -> f32[2] {
  %all-reduce.1 = (f32[64,256]{1,0}, f32[]) all-reduce(%a, %b), to_apply=%add
  %all-reduce-start.2 = bf16[10]{0} all-reduce-start(%c), to_apply=%add
  %all-reduce-done.2 = bf16[10]{0} all-reduce-done(%all-reduce-start.2)
  ROOT %get = f32[64,256]{1,0} get-tuple-element(%all-reduce.1), index=0
}
"""
    counts, total, outside = growth.count_collectives(program)
    assert counts == {"all-gather": 1, "all-reduce": 2}
    assert total == 8 * 4 * 4 + (64 * 256 + 1) * 4 + 10 * 2
    assert outside == 1


def test_work_is_the_same_whoever_asks_for_it():
    prompts = random_prompts(SHAPES["A"], FIXED, seed=3)
    assert prompts.shape == (16, 16) and prompts.min() >= 1 and prompts.max() < 4096
    assert (prompts == random_prompts(SHAPES["A"], FIXED, seed=3)).all()
    assert (prompts != random_prompts(SHAPES["A"], FIXED, seed=4)).any()
    assert random_windows(SHAPES["A"], 0).shape == (32, 129)
