"""A KL coefficient that is steered: wherever it starts, the KL settles at the target; a fixed one's KL depends on it.

    python experiments/recipes/adaptive_kl.py

Two cores of an Intel Xeon, JAX 0.10.2: 68 seconds of processor time.

The policy writes 16 of 8 tokens, each by a row of logits for its place and the token before; one of the tokens is worth
0.25. Its KL from the reference, a random one that it starts as, and its expected reward are exact sums along the chain,
and so is the best policy at each coefficient. It is trained by RLOO with the KL in the reward, 512 completions an
update, from 3 coefficients with 5 seeds, each with a reference of its own, rows of one program: once for each target,
with the controller on the sampled KL, and once with the coefficients left as they are.

Published (OpenAI 2019, Ziegler, section 2.2 and code): each update the coefficient is multiplied by 1 + clip(KL /
target - 1, -0.2, 0.2) * completions / horizon, with a target of 6 nats and a horizon of 10,000; the KL settles there.

Measured over the last quarter of 600 updates, with 95 % intervals over 5 seeds: reproduced. At either target no run is
more than 0.6 % off, from starts whose fixed coefficients end at 0.08, 9 and 40 nats; and the coefficient ends where
the best policy there is has the target's KL too.

| target | start | KL, steered   | coefficient   | highest on the way | within 10 % after | KL, fixed     |
|--------|-------|---------------|---------------|--------------------|-------------------|---------------|
| 6      | 0.01  | 5.989 ± 0.013 | 0.124 ± 0.011 | 39.6 ± 4.5         | 179,200           | 40.0 ± 4.6    |
|        | 0.1   | 5.990 ± 0.017 | 0.124 ± 0.011 | 13.2 ± 0.6         | 38,400            | 9.3 ± 1.2     |
|        | 1     | 5.990 ± 0.018 | 0.124 ± 0.011 | 6.10 ± 0.03        | 102,400           | 0.080 ± 0.013 |
| 3      | 0.01  | 2.996 ± 0.015 | 0.170 ± 0.018 | 39.5 ± 4.5         | 179,200           |               |
|        | 0.1   | 2.996 ± 0.014 | 0.170 ± 0.018 | 11.4 ± 0.7         | 51,200            |               |
|        | 1     | 2.996 ± 0.014 | 0.170 ± 0.018 | 3.10 ± 0.01        | 89,600            |               |

What the claim leaves out: the controller takes its time, at most 1 % an update here, so that from 0.01 the KL first
goes to 40 nats, as far as with the coefficient left, and is there for 100,000 completions.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rl_jax.errors import InputError
from rl_jax.evaluation import mean_interval
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import init_state, policy_gradient_update
from rl_jax.reinforce.distributions import entropy, exact_kl, token_logprobs
from rl_jax.reinforce.estimators import make_estimator
from rl_jax.reinforce.gradient import Scores
from rl_jax.run.figures import PALETTE, band_of, draw_band, draw_limit, open_figure
from rl_jax.run.loop import run_main
from rl_jax.run.spmd import make_mesh
from rl_jax.run.tables import open_results, write_table
from rl_jax.sampling import draw as draw_tokens
from rl_jax.sweep import make_sweep, product_grid
from rl_jax.types import Array, Metrics, Rollout, TrainState

POSITIVE, WORTH = 0, 0.25  # the token that is rewarded, and by how much
BLOCK = 25  # updates that a KL is averaged over to say when it has settled
COEFFICIENTS = np.geomspace(1e-3, 10.0, 400, dtype=np.float32)  # of the best policies that runs are compared with


@dataclasses.dataclass(frozen=True)
class Config:
    """The adaptive KL coefficient, from several starts, beside coefficients that are left as they are."""

    targets: tuple[float, ...] = (6.0, 3.0)
    """KL that the coefficient is steered to, nats a completion."""
    horizon: float = 10_000.0
    """Completions in which a far-off KL changes the coefficient by a fifth."""
    starts: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Coefficients at the start, reward units a nat."""
    seeds: int = 5
    """Runs of each start, each with a reference policy of its own."""
    updates: int = 600
    """Updates of a run; the KL is judged by the last quarter."""
    batch: int = 512
    """Completions in an update."""
    group_size: int = 4
    """Completions of each prompt."""
    vocab_size: int = 8
    """Tokens."""
    length: int = 16
    """Tokens of a completion."""
    learning_rate: float = 0.1
    """Adam's."""
    results: Path = Path("results/adaptive_kl")
    """Folder that the table and the figure are written to."""


def sample(table: Array, key: Array, prompts: int, group_size: int) -> Rollout:
    """Completions of random first tokens. Logits [C, V, V] of each place after each token -> Rollout of B."""
    length, vocab_size, _ = table.shape
    first_key, key = jax.random.split(key)
    first = jnp.repeat(jax.random.randint(first_key, (prompts,), 0, vocab_size), group_size)

    def step(before: Array, given: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        logits, uniforms = given
        tokens, logprobs = draw_tokens(logits[before], uniforms)
        return tokens, (tokens, logprobs)

    _, (tokens, logprobs) = jax.lax.scan(step, first, (table, jax.random.uniform(key, (length, len(first)))))
    return Rollout(
        prompts=first[:, None],
        prompt_mask=jnp.ones((len(first), 1), bool),
        completions=tokens.T,
        completion_mask=jnp.ones(tokens.T.shape, bool),
        behavior_logprobs=logprobs.T,
        truncated=jnp.ones(len(first), bool),
    )


def chain_logits(table: Array, rollout: Rollout) -> Array:
    """What each completion token was drawn from. [C, V, V] -> [B, C, V]."""
    before = jnp.concatenate([rollout.prompts, rollout.completions[:, :-1]], axis=1)
    return table[jnp.arange(len(table))[None, :], before]


def score_fn(table: Array, rollout: Rollout, ref_logits: Array) -> Scores:
    """The chain as the library asks for a policy."""
    logits = chain_logits(table, rollout)
    return Scores(token_logprobs(logits, rollout.completions), entropy(logits), exact_kl(logits, ref_logits))


def reward(rollout: Rollout) -> Array:
    """So much for each positive token. [B]."""
    return WORTH * jnp.sum(rollout.completions == POSITIVE, axis=1)


def measure(table: Array, ref_table: Array) -> Metrics:
    """Exact: "kl", nats a completion, and "reward", by the chance of each token at each place. [C, V, V] each -> []."""
    logprobs, ref_logprobs = jax.nn.log_softmax(table), jax.nn.log_softmax(ref_table)
    moves = jnp.exp(logprobs)

    def step(chance: Array, given: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        moves, kl = given
        after = chance @ moves
        return after, (chance @ kl, after[POSITIVE])

    anywhere = jnp.full(table.shape[1], 1 / table.shape[1])
    kls = jnp.sum(moves * (logprobs - ref_logprobs), axis=2)
    _, (kl, positive) = jax.lax.scan(step, anywhere, (moves, kls))
    return {"kl": jnp.sum(kl), "reward": WORTH * jnp.sum(positive)}


def optimal_table(ref_table: Array, kl_coefficient: Array | float) -> Array:
    """The policy of the highest E[r] - kl_coefficient KL: pi_ref exp(r / kl_coefficient), token by token from the last.

    A token's logit has what is yet to come after it: the logarithm of the partition function of the rest.
    """
    worth = jnp.zeros(ref_table.shape[1]).at[POSITIVE].set(WORTH / kl_coefficient)

    def back(rest: Array, ref_logits: Array) -> tuple[Array, Array]:
        logits = jax.nn.log_softmax(ref_logits) + (worth + rest)[None, :]
        return jax.nn.logsumexp(logits, axis=1), logits

    return jax.lax.scan(back, jnp.zeros(ref_table.shape[1]), ref_table, reverse=True)[1]


def reference(config: Config, seed: Array) -> Array:
    """The logits of a seed's reference. [C, V, V]."""
    shape = (config.length, config.vocab_size, config.vocab_size)
    return jax.random.normal(step_key(seed, Purpose.INIT), shape)


def make_run(config: Config, target: float | None) -> Callable[[dict[str, Array]], Metrics]:
    """A run: "seed" and "start" [] -> exact "kl" and "reward", and the "coefficient", before each update. [U] each."""
    steering = {} if target is None else {"kl_target": target, "kl_horizon": config.horizon}
    estimator = make_estimator("rloo", **steering)
    optimizer = optax.adam(config.learning_rate)

    def run(setting: dict[str, Array]) -> Metrics:
        ref_table = reference(config, setting["seed"])

        def update(state: TrainState, step: Array) -> tuple[TrainState, Metrics]:
            key = step_key(setting["seed"], Purpose.SAMPLE, step)
            rollout = sample(state.params, key, config.batch // config.group_size, config.group_size)
            ref_logits = chain_logits(ref_table, rollout)
            updated, metrics = policy_gradient_update(
                state,
                rollout,
                reward(rollout),
                estimator=estimator,
                score_fn=score_fn,
                optimizer=optimizer,
                group_size=config.group_size,
                ref_logprobs=token_logprobs(ref_logits, rollout.completions),
                context=ref_logits,
            )
            return updated, measure(state.params, ref_table) | {"coefficient": metrics["kl_coefficient"]}

        return jax.lax.scan(update, init_state(ref_table, optimizer, setting["start"]), jnp.arange(config.updates))[1]

    return run


def best_kl(config: Config) -> np.ndarray:
    """The KL of each seed's best policy at each of `COEFFICIENTS`, falling. [seeds, M]."""

    def of_seed(seed: Array) -> Array:
        ref_table = reference(config, seed)
        return jax.lax.map(lambda beta: measure(optimal_table(ref_table, beta), ref_table)["kl"], COEFFICIENTS)

    return np.asarray(make_sweep(of_seed, make_mesh())(np.arange(config.seeds)))


def settled(kl: np.ndarray, target: float) -> float:
    """Share of the updates after which the KL, averaged over blocks, stays within 10 % of the target. [U] -> 0 to 1."""
    blocks = kl[: len(kl) // BLOCK * BLOCK].reshape(-1, BLOCK).mean(axis=1)
    outside = np.flatnonzero(np.abs(blocks / target - 1) > 0.1)
    return (outside[-1] + 1) / len(blocks) if len(outside) else 0.0


def row(config: Config, target: float | None, start: float, runs: Metrics, best: np.ndarray) -> dict[str, Any]:
    """A line of the table, of the runs of a start [seeds, U] each; intervals are 95 % over seeds."""
    late = {name: np.asarray(values, np.float64)[:, -(config.updates // 4) :] for name, values in runs.items()}
    kl, coefficient = late["kl"].mean(axis=1), late["coefficient"].mean(axis=1)
    of_best = [np.interp(at, COEFFICIENTS, kls) for at, kls in zip(coefficient, best, strict=True)]
    line: dict[str, Any] = {
        "coefficient": "fixed" if target is None else f"steered to {target:g} nats",
        "start": start,
        "KL at the end, nats": mean_interval(kl),
        "over updates, sd": float(late["kl"].std(axis=1).mean()),
        "coefficient at the end": mean_interval(coefficient),
        "KL of the best policy there": mean_interval(np.array(of_best)),
        "reward": mean_interval(late["reward"]),
        "highest KL on the way": mean_interval(np.max(runs["kl"], axis=1)),
    }
    if target is None:
        return line
    thousands = config.updates * config.batch / 1000
    return line | {
        "furthest seed off target, %": 100 * float(np.abs(kl / target - 1).max()),
        "within 10 % after, 1000 completions": max(settled(seed, target) for seed in runs["kl"]) * thousands,
    }


def check(config: Config) -> None:
    """Raise InputError for settings that cannot work, before the long work."""
    if not config.starts or not all(COEFFICIENTS[0] <= start <= COEFFICIENTS[-1] for start in config.starts):
        raise InputError(f"starts are {config.starts}; give some, from 0.001 to 10.")
    if not config.targets or min(config.targets) <= 0 or config.horizon <= config.batch / 5:
        raise InputError("There must be targets above 0, and a horizon of more than a fifth of batch.")
    if config.group_size < 2 or config.batch % config.group_size or config.batch < config.group_size:
        raise InputError(f"batch is {config.batch}; it must be a multiple of group_size, {config.group_size}, over 1.")
    if config.vocab_size < 2 or config.length < 1 or config.seeds < 2 or config.updates < 4 * BLOCK:
        raise InputError(f"Two tokens, a length of 1, two seeds and {4 * BLOCK} updates are the least.")


def main(config: Config) -> None:
    check(config)
    began, folder = time.perf_counter(), open_results(config.results)
    grid, best = product_grid(start=config.starts, seed=range(config.seeds)), best_kl(config)
    rows, arms = [], dict[float | None, Metrics]()
    for target in (*config.targets, None):
        runs = jax.device_get(make_sweep(make_run(config, target), make_mesh())(grid))
        arms[target] = {name: x.reshape(-1, config.seeds, config.updates) for name, x in runs.items()}
        for number, start in enumerate(config.starts):
            rows.append(row(config, target, start, {name: x[number] for name, x in arms[target].items()}, best))
    draw(folder / "adaptive_kl.png", config, arms)
    write_table(folder, rows, dataclasses.asdict(config) | {"seconds": time.perf_counter() - began})


def draw(path: Path, config: Config, arms: dict[float | None, Metrics]) -> None:
    """KL over completions, steered and fixed, and the steered coefficient; bands are 95 % over seeds."""
    target = config.targets[0]
    panels = {
        f"Steered to {target:g} nats": arms[target]["kl"],
        "Coefficient left as it is": arms[None]["kl"],
        "The steered coefficient": arms[target]["coefficient"],
    }
    thousands = config.batch * np.arange(config.updates) / 1000
    with open_figure(path, list(panels), 4.2, 3.6) as every:
        for axes, runs in zip(every, panels.values(), strict=True):
            for start, values, colour in zip(config.starts, runs, PALETTE, strict=False):
                draw_band(axes, thousands, band_of(map(mean_interval, values.T)), f"from {start:g}", colour)
            axes.set(xlabel="completions, thousands")
        for axes in every[:2]:
            axes.set(ylabel="KL, nats a completion", ylim=(0, None))
            draw_limit(axes, target, "target")
        every[2].set(ylabel="reward units a nat", yscale="log")
        every[0].legend()


if __name__ == "__main__":
    run_main(main, Config)
