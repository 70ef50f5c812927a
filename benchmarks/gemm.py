"""What the machine can do: the rate of matrix products of given shapes, and the bandwidth of reading; JAX or PyTorch.

    python benchmarks/gemm.py '{"task": "jax", "shapes": [[1, 64, 256, 1024]], "dtype": "float32"}'

answers with the best flops a second of each shape [batch, m, k, n] over layouts and repeats, and with the best bytes a
second. PyTorch is needed for "torch" alone, JAX for "jax" alone.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.worker import Job, serve

Gemm = Sequence[int]  # batch, m, k, n
SECONDS, REPEATS = 0.04, 3  # that a measurement runs at least; measurements, of which the best counts
READ_BYTES = 1 << 28


def flops(gemm: Gemm) -> int:
    """Of one product, or of a batch of them."""
    batch, m, k, n = gemm
    return 2 * batch * m * k * n


def best_seconds(work: Callable[[], Any]) -> float:
    """The least time that a call takes, over repeats of as many calls as fill the time of a measurement."""
    work()
    start = time.perf_counter()
    work()
    calls = max(1, round(SECONDS / max(time.perf_counter() - start, 1e-6)))
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def answer(gemms: Sequence[Gemm], rates: Sequence[float], bandwidth: float) -> Mapping[str, Any]:
    """As the task returns it."""
    return {"rates": [[*gemm, rate] for gemm, rate in zip(gemms, rates, strict=True)], "bandwidth": bandwidth}


def with_jax(shapes: Sequence[Gemm], dtype: str) -> Job:
    """Products inside a compiled loop, as decoding has them, so that no call is counted."""
    import jax
    import jax.numpy as jnp

    def product(transposed: bool, out: Any, calls: int) -> Callable[..., Any]:
        equation = "bmk,bnk->bmn" if transposed else "bmk,bkn->bmn"

        def step(_: Any, carry: Any) -> Any:
            left, right, result = carry
            # Each product waits for the one before, and none can be left out.
            left = left.at[0, 0, 0].set(result[0, 0, 0].astype(left.dtype))
            return left, right, jnp.einsum(equation, left, right, preferred_element_type=out)

        return jax.jit(lambda *carry: jax.lax.fori_loop(0, calls, step, carry)[2], donate_argnums=2)

    def rate(gemm: Gemm) -> float:
        batch, m, k, n = gemm
        calls = max(1, min(200, int(2e9 / flops(gemm))))
        best = float("inf")
        for transposed, out in itertools.product((False, True), {dtype, "float32"}):
            fn = product(transposed, out, calls)
            left = jnp.full((batch, m, k), 0.01, dtype)
            right = jnp.full((batch, n, k) if transposed else (batch, k, n), 0.01, dtype)
            result = [jnp.zeros((batch, m, n), out)]

            def work(fn: Any = fn, left: Any = left, right: Any = right, result: Any = result) -> None:
                result[0] = jax.block_until_ready(fn(left, right, result[0]))

            best = min(best, best_seconds(work) / calls)
        return flops(gemm) / best

    def job() -> Mapping[str, Any]:
        numbers, total = jnp.ones(READ_BYTES // 4), jax.jit(jnp.sum)
        bandwidth = READ_BYTES / best_seconds(lambda: jax.block_until_ready(total(numbers)))
        return answer(shapes, [rate(gemm) for gemm in shapes], bandwidth)

    return job


def with_torch(shapes: Sequence[Gemm], dtype: str) -> Job:
    """Products into memory that is there already."""
    import os

    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    kind = getattr(torch, dtype)

    def rate(gemm: Gemm) -> float:
        batch, m, k, n = gemm
        best = float("inf")
        for transposed in (False, True):
            left, result = torch.full((batch, m, k), 0.01, dtype=kind), torch.empty((batch, m, n), dtype=kind)
            shape = (batch, n, k) if transposed else (batch, k, n)
            right = torch.full(shape, 0.01, dtype=kind)
            right = right.transpose(1, 2) if transposed else right
            parts, multiply = (left, right, result), torch.bmm
            if batch == 1:
                parts, multiply = tuple(part[0] for part in parts), torch.mm

            def work(parts: Any = parts, multiply: Any = multiply) -> None:
                multiply(parts[0], parts[1], out=parts[2])

            best = min(best, best_seconds(work))
        return flops(gemm) / best

    def job() -> Mapping[str, Any]:
        with torch.inference_mode():
            numbers = torch.ones(READ_BYTES // 4)
            return answer(shapes, [rate(g) for g in shapes], READ_BYTES / best_seconds(numbers.sum))

    return job


if __name__ == "__main__":
    serve({"jax": with_jax, "torch": with_torch})
