"""The limit: the least time that generation, an RL step or an update can take at the machine's measured rates.

A piece of work is a list of parts that must follow each other. A part takes at least its flops at the measured rate of
the very matrix products that it has, or its bytes at the measured bandwidth of reading, whichever is more; the limit is
the sum over the parts. What is counted, and nothing else is:

- A forward pass has four products a block (query, key and value as one, output, up, down), two of attention, and the
  head; a backward pass has two of the same flops for each of them. Causal attention counts whole, as everyone computes
  it here, over the mean length where it grows. Norms, softmax, sampling, the reward and the loss cost nothing.
- A decoding step reads every weight once and the filled part of the cache once, and writes nothing. Its attention is
  bound by that reading, so that its flops are not counted.
- The optimizer reads the gradient twice (its norm comes first) and parameters and both moments once, and writes the
  last three.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.work import PRETRAIN_BATCH, PRETRAIN_LENGTH, Shape, Work

Gemm = tuple[int, int, int, int]
"""Matrix products of one shape: batch, m, k, n. 2 * batch * m * k * n flops."""


class Part(NamedTuple):
    """What must be done before the next part can begin.

    Attributes:
        name: of the part.
        gemms: how often each product occurs.
        bytes: read and written.
        repeats: how often the part occurs, one after another.
    """

    name: str
    gemms: Mapping[Gemm, int]
    bytes: float
    repeats: int = 1


def matrices(shape: Shape) -> list[tuple[int, int, int]]:
    """The weights: (k, n, how often) of the four matrices of a block and of the head, the last."""
    d, layers = shape.width, shape.layers
    return [(d, 3 * d, layers), (d, d, layers), (d, 4 * d, layers), (4 * d, d, layers), (d, shape.vocab_size, 1)]


def weights(shape: Shape) -> int:
    """Numbers in the matrices of the blocks and in the tied embedding."""
    return sum(k * n * count for k, n, count in matrices(shape))


def forward(shape: Shape, sequences: int, length: int, scored: int) -> dict[Gemm, int]:
    """Products of a pass over whole sequences, with logits at `scored` places in all."""
    *blocks, (width, vocab, _) = matrices(shape)
    gemms: dict[Gemm, int] = {}
    for k, n, count in blocks:
        _add(gemms, (1, sequences * length, k, n), count)
    pairs, size = sequences * shape.heads, shape.width // shape.heads
    _add(gemms, (pairs, length, size, length), shape.layers)
    _add(gemms, (pairs, length, length, size), shape.layers)
    _add(gemms, (1, scored, width, vocab), 1)
    return gemms


def backward(forward: Mapping[Gemm, int]) -> dict[Gemm, int]:
    """Products of the gradients of both factors: [m, n] x [n, k] and [k, m] x [m, n]."""
    gemms: dict[Gemm, int] = {}
    for (batch, m, k, n), count in forward.items():
        _add(gemms, (batch, m, n, k), count)
        _add(gemms, (batch, k, m, n), count)
    return gemms


def decode(shape: Shape, sequences: int, columns: float, number_bytes: int) -> tuple[dict[Gemm, int], float]:
    """Products and bytes of one decoding step that looks at so many columns of the cache."""
    gemms: dict[Gemm, int] = {}
    for k, n, count in matrices(shape):
        _add(gemms, (1, sequences, k, n), count)
    cache = 2 * sequences * columns * shape.layers * shape.width
    return gemms, number_bytes * (weights(shape) + cache)


def generation_parts(shape: Shape, work: Work, number_bytes: int = 4) -> list[Part]:
    """Prefill of each prompt once, which predicts the first token; then C - 1 steps over all sequences."""
    prompt = forward(shape, work.prompts, work.prompt_length, work.prompts)
    columns = work.prompt_length + work.length / 2  # the mean of P + 1 to P + C - 1
    gemms, read = decode(shape, work.prompts * work.group_size, columns, number_bytes)
    return [Part("prefill", prompt, number_bytes * weights(shape)), Part("decode", gemms, read, work.length - 1)]


def training_parts(name: str, shape: Shape, sequences: int, length: int, scored: int) -> list[Part]:
    """A forward and a backward pass and the optimizer, float32."""
    there = forward(shape, sequences, length, scored)
    back = backward(there)
    size = 4 * weights(shape)
    return [Part(f"{name} forward", there, size), Part(f"{name} backward", back, 2 * size), Part("adamw", {}, 8 * size)]


def rl_step_parts(shape: Shape, work: Work) -> list[Part]:
    """Generation, the reference's forward pass, and the policy's update, float32; every completion has C tokens."""
    sequences = work.prompts * work.group_size
    length, scored = work.prompt_length + work.length - 1, sequences * work.length
    reference = Part("reference", forward(shape, sequences, length, scored), 4 * weights(shape))
    return [*generation_parts(shape, work), reference, *training_parts("policy", shape, sequences, length, scored)]


def pretrain_parts(shape: Shape) -> list[Part]:
    """One update on windows of text."""
    tokens = PRETRAIN_BATCH * PRETRAIN_LENGTH
    return training_parts("model", shape, PRETRAIN_BATCH, PRETRAIN_LENGTH, tokens)


def shapes_of(parts: Sequence[Part]) -> list[Gemm]:
    """Every shape of product that is to be measured, once."""
    return sorted({gemm for part in parts for gemm in part.gemms})


def part_seconds(part: Part, rates: Mapping[Gemm, float], bandwidth: float) -> float:
    """The least time of a part, all its repeats.

    Args:
        part: of the work.
        rates: flops a second of each of its products.
        bandwidth: bytes a second.
    """
    computing = sum(2 * gemm[0] * gemm[1] * gemm[2] * gemm[3] * n / rates[gemm] for gemm, n in part.gemms.items())
    return part.repeats * max(computing, part.bytes / bandwidth)


def floor(parts: Sequence[Part], rates: Mapping[Gemm, float], bandwidth: float) -> dict[str, float]:
    """The least time of each part, and "total", seconds."""
    seconds = {part.name: part_seconds(part, rates, bandwidth) for part in parts}
    return seconds | {"total": sum(seconds.values())}


def best_rates(answers: Sequence[Mapping]) -> tuple[dict[Gemm, float], float]:
    """The better rate of each product, and the better bandwidth, of what `gemm.py` answered in each library."""
    rates: dict[Gemm, float] = {}
    for answer in answers:
        for *gemm, rate in answer["rates"]:
            batch, m, k, n = gemm
            rates[batch, m, k, n] = max(rate, rates.get((batch, m, k, n), 0.0))
    return rates, max(answer["bandwidth"] for answer in answers)


def _add(gemms: dict[Gemm, int], gemm: Gemm, count: int) -> None:
    gemms[gemm] = gemms.get(gemm, 0) + count
