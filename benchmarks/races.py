"""Which races there are: who runs against whom, on what, and what is to be reached."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import limit
from benchmarks.race import Contender, own_python
from benchmarks.work import FIXED, FIXED_G, SHAPES

OURS = "rl_jax"
TORCH = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
PADDED = "rl_jax, padded to the longest"


class Race(NamedTuple):
    """A race of rl_jax against peers.

    Attributes:
        what: as the table calls it.
        ours: rl_jax's case.
        peers: name -> script and case.
        limit: task and dtype of the limit to measure beside it, if one is.
    """

    what: str
    ours: Mapping[str, Any]
    peers: Mapping[str, tuple[str, Mapping[str, Any]]]
    limit: tuple[str, str] | None = None


def _generation(shape: str, dtype: str) -> Race:
    case = {"task": "generate", "shape": shape, "dtype": dtype}
    return Race(f"generation, {shape}, {dtype}", case, {"transformers": ("peer_torch.py", case)}, ("generate", dtype))


def _rl_step(shape: str, algorithm: str, **others: Any) -> Race:
    case = {"task": "rl_step", "shape": shape, "algorithm": algorithm} | others
    spread = ", spread lengths" if others.get("spread") else ""
    floor = None if spread else ("rl_step", "float32")
    peer = {f"TRL {algorithm.upper()}": ("peer_torch.py", case)}
    return Race(f"RL step, {shape}{spread}", case, peer, floor)


def _pretraining(shape: str, dtype: str, compiled: bool = True) -> Race:
    case = {"task": "pretrain", "shape": shape, "dtype": dtype}
    peers = {"torch, eager": ("peer_torch.py", case | {"compiled": False})}
    if compiled:
        peers["torch, compiled"] = ("peer_torch.py", case | {"compiled": True})
    return Race(f"pretraining, {shape}, {dtype}", case, peers, ("pretrain", dtype))


def _tunix(task: str, shape: str) -> Race:
    case = {"task": task, "shape": shape}
    case |= {"dtype": "float32"} if task == "generate" else {"algorithm": "grpo"}
    names = {"generate": ("generation", "Tunix sampler"), "rl_step": ("RL step", "Tunix GRPO")}
    what, peer = names[task]
    return Race(f"{what}, {shape} as Llama", case | {"family": "llama"}, {peer: ("peer_tunix.py", case)})


_SPREAD = {"task": "generate", "shape": "A", "dtype": "float32", "spread": True}
RACES = {
    **{f"generation.{s}.{d}": _generation(s, d) for s in "ABG" for d in ("float32", "bfloat16")},
    "generation.A.spread": Race(
        "generation, A, spread lengths",
        _SPREAD,
        {PADDED: ("ours.py", _SPREAD | {"padded": True}), "transformers": ("peer_torch.py", _SPREAD)},
    ),
    **{f"generation.{s}.tunix": _tunix("generate", s) for s in "AB"},
    **{f"rl_step.{s}.{a}": _rl_step(s, a) for s in "AB" for a in ("rloo", "grpo")},
    **{f"rl_step.{s}.tunix": _tunix("rl_step", s) for s in "AB"},
    "rl_step.A.spread": _rl_step("A", "rloo", spread=True),
    **{f"pretraining.{s}.{d}": _pretraining(s, d) for s in "AB" for d in ("float32", "bfloat16")},
}
QUICK = {name: RACES[name] for name in ("generation.A.float32", "rl_step.A.rloo")} | {
    "pretraining.A.float32": _pretraining("A", "float32", compiled=False)
}

TARGETS = {  # race and peer, or "the limit" -> how many times as fast, or which share of the limit
    **{(f"generation.{s}.float32", "transformers"): 2.5 for s in "AB"},
    **{(f"generation.{s}.bfloat16", "transformers"): 3.0 for s in "AB"},
    ("generation.A.float32", "the limit"): 0.40,
    ("generation.G.float32", "the limit"): 0.45,
    **{(f"rl_step.{s}.rloo", "TRL RLOO"): 3.0 for s in "AB"},
    **{(f"rl_step.{s}.grpo", "TRL GRPO"): 2.5 for s in "AB"},
    **{(f"rl_step.{s}.tunix", "Tunix GRPO"): 3.0 for s in "AB"},
    ("generation.A.spread", PADDED): 2.5,
    ("rl_step.A.spread", "TRL RLOO"): 8.0,
    **{(f"pretraining.{s}.float32", "torch, eager"): 1.0 for s in "AB"},
}
STARTUP_TARGETS = {"cold": 10.0, "cached": 4.0}  # seconds on A


def contenders(race: Race, pythons: Mapping[str, Path]) -> list[Contender]:
    """rl_jax first, and every peer."""
    ours = Contender(OURS, own_python(), "ours.py", race.ours)
    environments = {"peer_torch.py": TORCH}
    peers = [
        Contender(name, str(pythons.get(script, own_python())), script, case, environments.get(script, {}))
        for name, (script, case) in race.peers.items()
    ]
    return [ours, *peers]


def limit_parts(race: Race) -> Sequence[limit.Part]:
    """The parts of the limit of a race's work."""
    assert race.limit is not None
    task, dtype = race.limit
    shape = SHAPES[race.ours["shape"]]
    work = FIXED_G if race.ours["shape"] == "G" else FIXED
    if task == "generate":
        return limit.generation_parts(shape, work, {"float32": 4, "bfloat16": 2}[dtype])
    return limit.rl_step_parts(shape, work) if task == "rl_step" else limit.pretrain_parts(shape)


def limit_contenders(race: Race, pythons: Mapping[str, Path]) -> list[Contender]:
    """Who measures the products of that work: JAX, and PyTorch."""
    assert race.limit is not None
    case = {"shapes": limit.shapes_of(limit_parts(race)), "dtype": race.limit[1]}
    return [
        Contender("JAX", own_python(), "gemm.py", case | {"task": "jax"}),
        Contender("PyTorch", str(pythons["peer_torch.py"]), "gemm.py", case | {"task": "torch"}),
    ]
