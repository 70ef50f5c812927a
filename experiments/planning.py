"""What a compiled program will take of a chip, worked out from its jaxpr and its compiled text: nothing is run.

A roofline (Williams 2009): the time is at least the work over the chip's peak, of each of its resources.
"""

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr

NUMBER_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # other types end in theirs
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
GIB = 2**30
NO_TRAFFIC = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")
SLICES = ("dynamic-slice", "gather", "slice", "slice-start")  # which read as much as they return


class Chip(NamedTuple):
    """Published peaks of a chip.

    Attributes:
        flops: a second, bfloat16 products; float32 products take them too at JAX's default precision.
        bandwidth: of its memory, bytes a second.
        links: between chips, bytes a second of each chip, all its links together.
        memory: bytes.
    """

    flops: float
    bandwidth: float
    links: float
    memory: float


# Google's pages of each, docs.cloud.google.com/tpu/docs/v5e, .../v5p and .../v6e: "peak compute per chip (bf16)",
# "HBM bandwidth", "interchip interconnect bandwidth" in Gbit/s over 8, "HBM capacity".
CHIPS = {
    "v5e": Chip(197e12, 819e9, 1600e9 / 8, 16 * 2**30),
    "v5p": Chip(459e12, 2765e9, 4800e9 / 8, 95 * 2**30),
    "v6e": Chip(918e12, 1600e9, 3200e9 / 8, 32 * 2**30),
}


class Work(NamedTuple):
    """What a program does, on each chip.

    Attributes:
        moved: bytes read and written in memory, no more than these.
        collectives: how many there are in the text, by kind.
        sent: bytes that they send.
    """

    moved: float
    collectives: dict[str, int]
    sent: float


class Plan(NamedTuple):
    """What the compiler says. Bytes and flops of one chip; `needed` is the whole, `work` None where it was refused."""

    arguments: float
    outputs: float
    temporaries: float
    needed: float
    flops: float = 0
    work: Work | None = None
    xla: Mapping[str, float] = MappingProxyType({})


class _Instruction(NamedTuple):
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    text: str


def count_flops(jaxpr: Jaxpr | ClosedJaxpr, trips: Sequence[int] = ()) -> float:
    """Floating-point operations of the matrix products of all devices together, each counted as often as it runs.

    Args:
        jaxpr: of the program, from `jax.make_jaxpr`.
        trips: how often loops whose number of rounds is found only as they run go round, from the outermost; 1 for
            those further in.
    """
    return sum(_flops_of(equation, trips) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _flops_of(equation: Any, trips: Sequence[int]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        sizes = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(sizes[axis] for axis in contracted)
    if name == "while":
        return (trips[0] if trips else 1) * count_flops(params["body_jaxpr"], trips[1:])
    if name == "cond":  # of platforms the last is the default
        return count_flops(params["branches"][-1], trips)
    times = params["length"] if name == "scan" else 1
    if name == "shard_map":  # whose shapes are those of one device
        times = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    inner = [value for value in params.values() if isinstance(value, Jaxpr | ClosedJaxpr)]
    return times * sum(count_flops(each, trips) for each in inner)


def count_work(program: str, trips: Sequence[int] = ()) -> Work:
    """Memory traffic and collectives of one chip, from a compiled program's text, as often as each runs.

    Every instruction reads its operands and writes its result, but for what lies in a TPU's vector memory, and for
    slices, in fusions too. Of what a fusion takes a part of in another way, the whole counts: a bound from above.
    The padding of a TPU's tiles does not.

    Args:
        program: the text.
        trips: as for `count_flops`; the text says the rounds of the other loops.
    """
    computations, entry = _read_program(program)
    counts: dict[str, int] = {}
    sent: dict[str, float] = {}

    def send(kind: str, each: _Instruction, size: float) -> None:
        # A TPU's compiler writes a collective that goes on beside products once for each of them, with one channel.
        stage = re.search(r"channel_id=\d+(?=.*async_collective_fusion_config)", each.text)
        channel = stage[0] if stage else ""
        if not stage or channel not in sent:
            counts[kind] = counts.get(kind, 0) + 1
        sent[channel] = min(sent.get(channel, size), size) if stage else sent.get(channel, 0) + size

    def walk(name: str, times: float, trips: Sequence[int], fused: bool) -> float:
        shapes = {each.name: each.shape for each in computations.get(name, ())}
        moved = 0.0
        for each in computations.get(name, ()):
            operands = [shapes.get(operand, "") for operand in each.operands]
            kind = _collective(each, computations[name]) if fused else each.op.removesuffix("-start")
            if kind in COLLECTIVES:
                send(kind, each, times * _bytes_sent(kind, each, operands))
            if not fused:
                moved += times * _bytes_moved(each, operands, computations)
            rounds, inner = 1, trips
            if each.op == "while":
                known = _known_rounds(each, computations)
                rounds, inner = (known, trips) if known else (trips[0] if trips else 1, trips[1:])
            for called in _called(each.text):
                within = fused or each.op not in ("while", "conditional", "call")
                moved += walk(called, times * rounds, inner, within)
        return moved

    moved = walk(entry, 1.0, tuple(trips), False)
    return Work(moved, counts, sum(sent.values()))


def _read_program(program: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions of each computation, and the name of the entry."""
    computations: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    entry = ""
    for line in program.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            shape, rest = _split_shape(found[2])
            op = re.match(r" ?([\w\-]+)\(", rest)
            if op:
                operands = re.findall(r"%([\w.\-]+)", rest[: _closing(rest)])
                current.append(_Instruction(found[1], shape, op[1], tuple(operands), rest))
    return computations, entry


def _split_shape(text: str) -> tuple[str, str]:
    end = _closing(text) if text.startswith("(") else text.find(" ")
    return text[:end], text[end:]


def _closing(text: str) -> int:
    """Where the first parenthesis is closed again."""
    depth = 0
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return place.end()
    return len(text)


def _called(text: str) -> list[str]:
    one = re.findall(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", text)
    several = re.findall(r"branch_computations=\{([^}]*)\}", text)
    return one + [name.strip(" %") for names in several for name in names.split(",")]


def _known_rounds(loop: _Instruction, computations: Mapping[str, list[_Instruction]]) -> int:
    """Rounds of a loop whose text, or whose condition, says them: a counter from 0 below a constant; 0 otherwise."""
    known = re.search(r"known_trip_count[^\d]*(\d+)", loop.text)
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    if known or not condition:
        return int(known[1]) if known else 0
    last = computations[condition[1]][-1]
    limits = {each.name: re.match(r" ?constant\((\d+)\)", each.text) for each in computations[condition[1]]}
    limit = limits.get(last.operands[1]) if last.op == "compare" and "direction=LT" in last.text else None
    return int(limit[1]) if limit else 0


def _collective(each: _Instruction, body: Sequence[_Instruction]) -> str:
    """In a fusion a TPU's compiler writes a reduce-scatter as an all-reduce of which only slices are taken."""
    if each.op != "all-reduce":
        return each.op.removesuffix("-start")
    users = [other.op in SLICES for other in body if each.name in other.operands]
    return "reduce-scatter" if users and all(users) else each.op


def _bytes_sent(kind: str, each: _Instruction, operands: list[str]) -> float:
    """Of one chip to others, in a ring of many: twice its part for a sum, what it did not have for a gathering."""
    given, got = sum(map(shape_bytes, operands)), shape_bytes(each.shape)
    if kind in ("all-reduce", "reduce-scatter"):
        return given * (2 if kind == "all-reduce" else 1)
    if each.op.endswith("-start"):  # whose result has the operands in it
        got -= given
    return got - given if kind == "all-gather" else got


def _bytes_moved(each: _Instruction, operands: list[str], computations: Mapping[str, list[_Instruction]]) -> float:
    if each.op in NO_TRAFFIC or each.op.endswith("-done"):
        return 0
    given, got = [shape_bytes(shape, in_memory=True) for shape in operands], shape_bytes(each.shape, in_memory=True)
    if each.op == "slice-start":  # whose result has the operands in it
        return shape_bytes(each.shape) - sum(map(shape_bytes, operands)) + got - sum(given)
    if each.op in SLICES:
        return 2 * got
    if "dynamic-update-slice" in f"{each.op} {each.name}":  # in place
        return 2 * sum(size for size in given if size < got)
    if each.op == "fusion" and (called := _called(each.text)):
        given = [size and min(size, _bytes_read(called[0], at, computations)) for at, size in enumerate(given)]
    return sum(given) if each.op.endswith("-start") else sum(given) + got


def _bytes_read(name: str, number: int, computations: Mapping[str, list[_Instruction]]) -> float:
    """Of a parameter of a fusion, by its number: the slices of it, where nothing else is taken, or all."""
    body = computations.get(name, [])
    parameter = next((each for each in body if each.op == "parameter" and f" parameter({number})" in each.text), None)
    if parameter is None:
        return math.inf
    read = 0.0
    for user in (each for each in body if parameter.name in each.operands):
        if user.op in SLICES:
            read += shape_bytes(user.shape)
        elif user.op == "fusion" and (called := _called(user.text)):
            places = [at for at, operand in enumerate(user.operands) if operand == parameter.name]
            read += sum(_bytes_read(called[0], at, computations) for at in places)
        else:
            return math.inf
    return read


def shape_bytes(shape: str, in_memory: bool = False) -> float:
    """Bytes of a shape as HLO writes it, such as "f32[64,256]{1,0}", or of a tuple's together.

    Args:
        shape: the text.
        in_memory: leaves out what its layout puts into a memory space of the chip's own, such as "{0:T(256)S(1)}".
    """
    total = 0.0
    for kind, sizes, layout in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?", shape):
        if not (in_memory and re.search(r"S\([1-9]", layout)):
            bits = NUMBER_BITS.get(kind) or int((re.search(r"\d+", kind) or ["0"])[0])
            total += bits / 8 * math.prod(int(size) for size in sizes.split(",") if size)
    return total


def roofline(chip: Chip, flops: float, work: Work) -> dict[str, float]:
    """Least seconds that each resource needs, of one chip's flops and work."""
    return {"products": flops / chip.flops, "memory": work.moved / chip.bandwidth, "links": work.sent / chip.links}


def extend(one: Plan, two: Plan, steps: float) -> Plan:
    """Along the line from one plan to another, so many times as far as that; kinds of collectives by their union."""

    def on(a: float, b: float) -> float:
        return a + steps * (b - a)

    works = [plan.work or Work(0, {}, 0) for plan in (one, two)]
    moved, sent = (on(*(getattr(work, name) for work in works)) for name in ("moved", "sent"))
    kinds = set(works[0].collectives) | set(works[1].collectives)
    counts = {kind: round(on(*(work.collectives.get(kind, 0) for work in works))) for kind in kinds}
    numbers = {name: on(getattr(one, name), getattr(two, name)) for name in Plan._fields[:5]}
    xla = {name: on(one.xla[name], two.xla[name]) for name in one.xla}
    return Plan(**numbers, work=Work(moved, counts, sent), xla=xla)


def fits(plan: Plan, memory: float | None) -> bool | None:
    """Whether a chip with so much memory can run it; None where nothing is known of its memory."""
    return None if memory is None else plan.work is not None and plan.needed <= memory


def describe(name: str, plan: Plan, chip: Chip | None, memory: float | None, tokens: int) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"program": name}
    parts = ("arguments", "outputs", "temporaries", "needed")
    row |= {f"{part}, GiB": getattr(plan, part) / GIB for part in parts}
    row |= {"of, GiB": None if memory is None else memory / GIB}
    row |= {"fits": "–" if memory is None else "yes" if fits(plan, memory) else "no"}
    if plan.work is None:
        return row
    row |= {"Tflop": plan.flops / 1e12, "moved, GB": plan.work.moved / 1e9}
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(plan.work.collectives.items()))
    row |= {"collectives": kinds or "none", "sent, GB": plan.work.sent / 1e9}
    if chip is not None:
        seconds = roofline(chip, plan.flops, plan.work)
        bound = max(seconds, key=lambda part: seconds[part])
        row |= {f"{part}, ms": 1e3 * value for part, value in seconds.items()}
        row |= {"bound by": bound, "tokens/s at most": tokens / seconds[bound]}
    return row
