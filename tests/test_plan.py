"""Plans of programs for devices that are there: what is counted in them is what their shapes say."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import plan, plan_slices
from experiments.planning import CHIPS, Plan, Work, count_flops, count_work, describe, extend, roofline, shape_bytes
from experiments.programs import argument_bytes, measure_peak
from rl_jax.errors import InputError
from rl_jax.run.spmd import each_device, make_mesh, pmapped

SMALL = {
    "topology": "cpu",
    "model": "1x32x4",
    "windows": 1,
    "context": 16,
    "completions": 2,
    "group_size": 2,
    "prompt_length": 4,
    "completion_length": 8,
}
SHAPES = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((16, 64), (64, 64))]


def repeated(x, w):
    return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ w), x)


def until(x, w):
    """Goes round until something happens, and within that again."""

    def inner(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: jnp.tanh(x @ w), x)

    return jax.lax.while_loop(lambda x: jnp.sum(x) > 2, inner, x)


@pytest.mark.parametrize(("fn", "trips", "times"), [(repeated, (), 5), (until, (3, 7), 21), (until, (3,), 3)])
def test_flops_of_loops(fn, trips, times):
    assert count_flops(jax.make_jaxpr(fn)(*SHAPES), trips) == times * 2 * 16 * 64 * 64


def test_flops_of_devices_by_themselves():
    mesh = make_mesh()
    mapped = pmapped(each_device(lambda x, w: x @ w, mesh, (0, None), 0), mesh, (0, None), 0)
    assert count_flops(jax.make_jaxpr(mapped)(*SHAPES)) == 2 * 16 * 64 * 64


@pytest.mark.parametrize(("fn", "trips", "times"), [(repeated, (), 5), (until, (3, 7), 21)])
def test_traffic_of_loops(fn, trips, times):
    program = jax.jit(fn).lower(*SHAPES).compile().as_text()
    read = 4 * (16 * 64 + 64 * 64)
    assert times * read < count_work(program, trips).moved < 4 * times * read


def test_collectives_of_a_program():
    mesh = make_mesh()
    mapped = pmapped(lambda x, w: jnp.sum(x, axis=0) @ w, mesh, (0, None), None)
    work = count_work(mapped.lower(*SHAPES).compile().as_text())
    assert work.collectives == {"all-reduce": 1}
    assert work.sent == 2 * 4 * 64


TPU = """HloModule jit_step

%fused (p: f32[8,4]) -> f32[4] {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  %all-reduce = f32[8,4]{1,0:T(8,128)} all-reduce(%p), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  ROOT %own = f32[4]{0} dynamic-slice(%all-reduce), dynamic_slice_sizes={1,4}
}

%begin (b: f32[4]) -> f32[8] {
  %b = f32[4]{0:S(1)} parameter(0)
  ROOT %g = f32[8]{0:S(1)} all-gather(%b), channel_id=2, backend_config={"async_collective_fusion_config":{}}
}

%go_on (b: f32[4]) -> f32[8] {
  %b = f32[4]{0:S(1)} parameter(0)
  ROOT %g.1 = f32[8]{0:S(1)} all-gather(%b), channel_id=2, backend_config={"async_collective_fusion_config":{}}
}

%part (p.1: bf16[16,64]) -> bf16[2,64] {
  %p.1 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %slice = bf16[2,64]{1,0} slice(%p.1), slice={[0:2], [0:64]}
}

%sliced (q: s32[], p.2: bf16[16,64], p.3: bf16[16,64]) -> f32[64] {
  %q = s32[]{:T(128)} parameter(0)
  %p.2 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(1)
  %p.3 = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(2)
  %nested = bf16[2,64]{1,0} fusion(%p.2), kind=kLoop, calls=%part
  %row = bf16[1,64]{1,0} dynamic-slice(%p.2, %q, %q), dynamic_slice_sizes={1,64}
  %all = bf16[16,64]{1,0} negate(%p.3)
  ROOT %sum = f32[64]{0} custom-call(%nested, %row, %all)
}

%body (c: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %c = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%c), index=1
  %near = f32[8,4]{1,0:T(8,128)S(1)} copy(%x)
  %part = f32[4]{0} fusion(%near), kind=kCustom, calls=%fused
  %stage = f32[8]{0:S(1)} fusion(%few), kind=kCustom, calls=%go_on
  ROOT %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%x, %x)
}

%condition (c.1: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  %c.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[8,4])) -> f32[16,4] {
  %a = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %w = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) while(%a), condition=%condition, body=%body
  %y = f32[8,4]{1,0:T(8,128)} get-tuple-element(%w), index=1
  %cache = bf16[16,64]{1,0:T(8,128)(2,1)} copy-done(%a)
  %zero = s32[]{:T(128)} constant(0)
  %stage.1 = f32[8]{0:S(1)} fusion(%few.1), kind=kCustom, calls=%begin
  %sum.1 = f32[64]{0:S(1)} fusion(%zero, %cache, %cache), kind=kCustom, calls=%sliced
  %early = ((bf16[16,64]{1,0}), bf16[4,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%cache), slice={[0:4], [0:64]}
  %start = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%y), dimensions={0}
  ROOT %done = f32[16,4]{1,0} all-gather-done(%start)
}
"""


def test_text_of_a_tpu():
    work = count_work(TPU, (100,))  # the loop says its own rounds
    assert work.collectives == {"reduce-scatter": 1, "all-gather": 2}
    assert work.sent == 6 * 4 * 32 + 4 * 4 + 4 * 32  # the second gathering goes on in the loop
    in_loop, early = 4 * 32 + 4 * 4, 2 * 64 * 4 + 4
    sliced = 4 + 2 * 64 * (2 + 1) + 2 * 64 * 16  # two slices of one operand, and all of another
    assert work.moved == 6 * in_loop + sliced + early + 4 * 32  # what lies in vector memory moves for nothing
    assert shape_bytes("(bf16[3,5]{1,0}, /*index=1*/pred[7], s4[8], f8e4m3fn[2]{0:T(128)S(1)})") == 30 + 7 + 4 + 2


def test_least_time_is_the_longest():
    chip = CHIPS["v5e"]
    work = Work(819e9, {"all-gather": 2}, 100e9)
    assert roofline(chip, 197e12 / 4, work) == pytest.approx({"products": 0.25, "memory": 1, "links": 0.5})
    one = Plan(2**30, 0, 2**30, 2 * 2**30, 197e12 / 4, work)
    row = describe("rollout", one, chip, chip.memory, 1000)
    assert row["bound by"] == "memory" and row["tokens/s at most"] == pytest.approx(1000)
    assert row["fits"] == "yes" and describe("rollout", one, chip, 2**30, 1000)["fits"] == "no"
    assert describe("rollout", one._replace(work=None), chip, chip.memory, 1)["fits"] == "no"


@pytest.mark.slow
def test_a_line_through_two_depths_meets_the_third():
    config = plan.Config(**SMALL | {"model": "6x32x4"}, dtype="float32")
    mesh = make_mesh()
    whole = plan.plan_program("pretraining", config, mesh)
    line = plan.plan_program("pretraining", plan.dataclasses.replace(config, layers_compiled=2), mesh)
    assert line.arguments == whole.arguments and line.flops == whole.flops
    assert line.work.sent == pytest.approx(whole.work.sent, rel=1e-3)
    assert line.needed == pytest.approx(whole.needed, rel=0.1)
    assert extend(line, whole, 0).needed == line.needed


def test_a_line_to_what_is_refused(monkeypatch):
    config, mesh = plan.Config(**SMALL | {"model": "6x32x4"}, layers_compiled=2), make_mesh()
    plans = iter(2 * [Plan(1, 0, 1, 2, 1, Work(1, {}, 1)), Plan(2, 0, 50, 52)])
    monkeypatch.setattr(plan, "compile_program", lambda program, chips: next(plans))
    line = plan.plan_program("pretraining", config, mesh)
    whole = argument_bytes(plan.make_program("pretraining", config, plan.model_config(config), mesh))
    assert line.work is None and line.arguments == whole and line.needed == whole + 50
    assert plan.plan_row("pretraining", config, jax.devices(), str)[0]["layers compiled"] == "2 and 4"
    assert plan.depths(config, 4) == (4,) and plan.depths(config, 5) == (2, 4)


@pytest.mark.parametrize("mesh", ["", pytest.param("data=2,fsdp=2,tensor=2", marks=pytest.mark.slow)])
def test_the_command(tmp_path, mesh, capsys):
    plan.main(plan.Config(**SMALL, mesh=mesh, folder=tmp_path))
    rows = json.loads((tmp_path / "table.json").read_text("utf-8"))
    assert [row["program"] for row in rows] == list(plan.PROGRAMS)
    assert all(row["Tflop"] > 0 and row["moved, GB"] > 0 and row["needed, GiB"] > 0 for row in rows)
    assert all(row["layers compiled"] == "all" for row in rows)
    assert all(row["sent, GB"] > 0 for row in rows if mesh or row["program"] != "rollout")
    assert "pretraining: compiling" in capsys.readouterr().out


def test_arguments_are_what_the_layout_says():
    config = plan.Config(**SMALL, mesh="fsdp=2,tensor=4")
    mesh = make_mesh(jax.devices(), plan.parse_mesh(config.mesh, 8))
    program = plan.make_program("pretraining", config, plan.model_config(config), mesh)
    matrices = 2048 * 32 + 4 * 32 * 32 + 3 * 32 * plan.model_config(config).mlp_width
    assert argument_bytes(program) == pytest.approx(3 * 4 * matrices / 8, rel=0.05)  # parameters, two moments
    assert plan.compile_program(program, 8).arguments == pytest.approx(argument_bytes(program), rel=0.01)


def test_changes_until_it_fits(monkeypatch):
    config = plan.Config(**SMALL, dtype="float32", mesh="data=8")
    tried = []

    def planned(name, changed, mesh):
        tried.append(changed)
        size = 3 - changed.remat - (changed.dtype == "bfloat16") - (changed.at_once > 1)
        return Plan(0, 0, 1, size, 1, Work(1, {}, 1))

    monkeypatch.setattr(plan, "plan_program", planned)
    monkeypatch.setattr(plan, "argument_bytes", lambda program: -9)
    devices = jax.devices()
    assert plan.advice("pretraining", config, devices, 1, str) == "dtype bfloat16, remat"
    assert [each.remat for each in tried] == [False, True]
    assert plan.advice("pretraining", config, devices, 0, str) == "dtype bfloat16, remat, at-once 4"
    assert plan.advice("pretraining", config, devices, -1, str).startswith("none of these: temporaries")
    assert tried[-1].mesh == "data=1,fsdp=2,tensor=4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topology": "v4:2x4"}, "topology 'v4:2x4' cannot be read"),
        ({"topology": "v5e"}, "topology 'v5e' cannot be read"),
        ({"model": "2B"}, "no model '2B': take 135M, 1B, 8B, 70B"),
        ({"mesh": "data=3"}, "needs 3 devices, and there are 8"),
        ({"programs": ("rollouts",)}, "no program 'rollouts'"),
        ({"completions": 3}, "24 completions do not divide into groups of 2 over 8"),
        ({"context": 0}, "context is 0"),
    ],
)
def test_mistakes(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        plan.main(plan.Config(**SMALL | changes, folder=tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is there")
def test_a_missing_compiler_is_named():
    with pytest.raises(InputError, match=r"pip install -r requirements-tpu\.txt"):
        plan.named_devices("v5e:2x4")


def test_what_a_refusal_says():
    whole = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded by 1.75G."
    parts = "Ran out of memory on HBM, the total memory required for HLO temporaries (512.00M) exceeds available HBM."
    assert plan.refused_bytes(whole, 2**30) == 17.5 * 2**30
    assert plan.refused_bytes(parts, 2**30) == 1.5 * 2**30
    assert plan.refused_bytes("INTERNAL: Mosaic failed to compile", 2**30) is None


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is missing: requirements-tpu.txt")
@pytest.mark.parametrize("program", plan.PROGRAMS)
def test_a_tpu_that_is_not_there(tmp_path, program):
    plan.main(plan.Config(**SMALL | {"topology": "v5e:2x4"}, programs=(program,), folder=tmp_path))
    (row,) = json.loads((tmp_path / "table.json").read_text("utf-8"))
    assert row["fits"] == "yes" and np.isfinite(row["tokens/s at most"])
    with pytest.raises(InputError, match="none that libtpu knows"):
        plan.named_devices("v5e:3x5")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is missing: requirements-tpu.txt")
def test_a_tpu_that_is_too_small():
    config = plan.Config("v5e:2x2", "2x2048x16", context=16384, windows=16, programs=("pretraining",))
    row, _ = plan.plan_row("pretraining", config, plan.choose_devices(config.topology), str)
    assert row["fits"] == "no" and row["needed, GiB"] > row["of, GiB"] == 16
    assert row["would fit with"]


@pytest.mark.parametrize("program", ["pretraining", pytest.param("update", marks=pytest.mark.slow)])
def test_memory_that_is_planned_is_taken(program):
    sizes = {"model": "2x256x4", "context": 512, "windows": 8, "completions": 64, "completion_length": 60}
    config = plan.Config(**SMALL | sizes, dtype="float32")
    mesh = make_mesh(jax.devices()[:1])
    made = plan.make_program(program, config, plan.model_config(config), mesh)
    needed = plan.compile_program(made, 1).needed
    assert measure_peak(made, mesh) == pytest.approx(needed, rel=0.15)


def test_memory_is_measured_where_it_can_be(monkeypatch):
    config, mesh = plan.Config(**SMALL), make_mesh()
    made = plan.make_program("pretraining", config, plan.model_config(config), mesh)
    monkeypatch.setattr(plan.Path, "exists", lambda path: False)
    with pytest.raises(InputError, match="leave out measure"):
        measure_peak(made, mesh)


def test_slices_are_planned_once(tmp_path, monkeypatch):
    planned = []

    def plan_row(name, config, devices, say):
        planned.append((config.topology, config.model, name))
        return {"program": name, "fits": "yes", "bound by": "memory", "tokens/s at most": 80.0}, {}

    monkeypatch.setattr(plan, "plan_row", plan_row)
    monkeypatch.setattr(plan, "choose_devices", lambda topology: jax.devices())
    plan_slices.main(plan_slices.Config(only=("v5e:2x4",), programs=("rollout",), folder=tmp_path))
    plan_slices.main(plan_slices.Config(only=("v5e:2x4",), programs=("rollout", "update"), folder=tmp_path))
    rows = json.loads((tmp_path / "table.json").read_text("utf-8"))
    assert [row["program"] for row in rows] == ["rollout", "update"] * (len(rows) // 2)
    assert len(planned) == len(set(planned)) == len(rows)
    assert all(row["tokens/s a chip at most"] == 10 for row in rows)
    with pytest.raises(InputError, match=r"No case is of 2B: take some of v5e:2x4, 135M"):
        plan_slices.main(plan_slices.Config(only=("2B",), folder=tmp_path))


def test_the_table_of_the_docs_is_of_the_cases():
    text = (plan.Path(__file__).parents[1] / "docs/plan.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| v")]
    assert rows and {(row[0], row[2], row[3]) for row in rows} <= set(plan_slices.CASES)
