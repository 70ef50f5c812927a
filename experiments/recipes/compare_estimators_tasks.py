"""Tasks whose optimum is known, small enough for hundreds of runs: walks on a graph, and a contextual bandit.

A task is a family of problems, one for each run, and pure functions of a problem: runs are mapped over problems, so
that an interval over runs speaks of the family, and not of one draw.

Letters: S problems, N prompts, B sequences, C completion length, V vocabulary, W walks that there are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rl_jax.errors import InputError
from rl_jax.keys import Purpose, step_key
from rl_jax.learner import apply_gradients, init_state
from rl_jax.models.config import TransformerConfig
from rl_jax.models.tabular import init_table, tabular_logits, tabular_values
from rl_jax.models.transformer import add_value_head, init_params
from rl_jax.reinforce.distributions import entropy, exact_kl, token_logprobs
from rl_jax.reinforce.exact import objective, optimal_policy
from rl_jax.reinforce.gradient import ScoreFn, Scores, reinforce_gradient
from rl_jax.rollout import generate
from rl_jax.run.spmd import make_mesh
from rl_jax.sampling import Sampling, draw
from rl_jax.scoring import completion_logprobs, make_score_fn, reference_scores, score_completions
from rl_jax.sweep import make_sweep
from rl_jax.types import Array, Metrics, PyTree, Rollout, TrainState

GOAL = 0  # the node that ends a walk: its token is the end-of-sequence token
MOST_WALKS = 20_000


class Task(NamedTuple):
    """What an algorithm has to deal with, and how far it may get.

    Attributes:
        problems: their arrays, among them the parameters of each one's reference policy, `problem.ref_params`, from
            which every run starts. A pytree [S, ...].
        sample: params, problem, key, number of prompts, completions of each -> a Rollout of random prompts.
        reward: problem, Rollout -> [B].
        reference: problem, Rollout -> log-probabilities under the reference [B, C], and the ScoreFn's context.
        make_score_fn: problem -> a ScoreFn, with values.
        evaluate: params, problem, key -> {"reward": [], "kl": []}, means over all prompts.
        best: problem, kl_coefficient -> the most of reward - kl_coefficient * KL that there is. [].
        prompts: ids of prompts, the last of their tokens, are below this.
        unit: standard deviation of the reward among the reference's completions of a prompt.
    """

    problems: Any
    sample: Callable[[PyTree, Any, Array, int, int], Rollout]
    reward: Callable[[Any, Rollout], Array]
    reference: Callable[[Any, Rollout], tuple[Array, Any]]
    make_score_fn: Callable[[Any], ScoreFn]
    evaluate: Callable[[PyTree, Any, Array], Metrics]
    best: Callable[[Any, float | Array], Array]
    prompts: int
    unit: float


class Graph(NamedTuple):
    """A directed graph in which every node leads to the goal.

    Attributes:
        edges: whether an edge leads from the first node to the second. bool [V, V].
        distances: steps of the shortest walk from each node to the goal. int32 [V].
    """

    edges: np.ndarray
    distances: np.ndarray


def random_graph(seed: int, nodes: int, degree: float, length: int) -> Graph:
    """A graph like trlX's "randomwalks": each edge is there or not by chance, and the goal is in reach of all.

    Args:
        seed: of the draw; graphs in which some node is out of reach are drawn again.
        nodes: V, the goal included.
        degree: how many edges lead from a node on average.
        length: C, the most steps that the shortest walk from any node takes.

    Raises:
        InputError: no graph of a thousand has the goal in reach of all.
    """
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        edges = rng.random((nodes, nodes)) < degree / (nodes - 1)
        np.fill_diagonal(edges, False)
        edges[GOAL] = False
        distances = shortest_distances(edges)
        if distances.max() <= length:
            return Graph(edges, distances.astype(np.int32))
    raise InputError(f"No graph of {nodes} nodes and {degree} edges each has its goal within {length} steps of all.")


def shortest_distances(edges: np.ndarray) -> np.ndarray:
    """Steps to the goal from each node, V or more where it is out of reach. bool [V, V] -> int64 [V]."""
    nodes = len(edges)
    distances = np.where(np.arange(nodes) == GOAL, 0, nodes)
    for _ in range(nodes):
        distances = np.minimum(distances, 1 + np.where(edges, distances[None, :], nodes).min(axis=1))
    return distances


def walk_rewards(rollout: Rollout, edges: Array, distances: Array) -> Array:
    """Steps of the shortest walk over those of this one; 0 for a walk that leaves the edges or misses the goal.

    Prompts are start nodes [B, 1], completions the nodes walked to [B, C]; bool [V, V], int32 [V] -> [B], at most 1.
    """
    starts, mask = rollout.prompts[:, -1:], rollout.completion_mask
    before = jnp.concatenate([starts, rollout.completions[:, :-1]], axis=1)
    valid = jnp.all(edges[before, rollout.completions] | ~mask, axis=1) & ~rollout.truncated
    return jnp.where(valid, distances[starts[:, 0]] / jnp.sum(mask, axis=1), 0.0)


def random_walks(key: Array, edges: Array, starts: Array, length: int) -> Rollout:
    """Walks that take an edge of each node by chance, to the goal or for C steps. bool [V, V], int32 [B] -> B walks."""
    logits = jnp.where(edges, 0.0, -jnp.inf).at[GOAL, GOAL].set(0.0)

    def walk(nodes: Array, key: Array) -> tuple[Array, Array]:
        after = jax.random.categorical(key, logits[nodes]).astype(jnp.int32)
        return after, after

    _, walked = jax.lax.scan(walk, starts, jax.random.split(key, length))
    return as_rollout(starts, walked.T)


def as_rollout(starts: Array | np.ndarray, completions: Array | np.ndarray) -> Rollout:
    """Walks as a rollout that nothing has sampled. Tokens after the goal are zeros. int32 [B], int32 [B, C]."""
    starts, completions = jnp.asarray(starts, jnp.int32), jnp.asarray(completions, jnp.int32)
    reached = jnp.cumsum(completions == GOAL, axis=1) > 0
    mask = jnp.pad(~reached[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return Rollout(
        prompts=starts[:, None],
        prompt_mask=jnp.ones((len(starts), 1), bool),
        completions=jnp.where(mask, completions, 0),
        completion_mask=mask,
        behavior_logprobs=jnp.zeros(mask.shape),
        truncated=~reached[:, -1],
    )


def successful_walks(graph: Graph, length: int) -> Rollout:
    """Every walk along edges that reaches the goal within C steps, from every start: all that is rewarded. B = W.

    Raises:
        InputError: there are more than 20,000.
    """
    walks: list[tuple[int, ...]] = [(node,) for node in range(1, len(graph.edges))]
    done: list[tuple[int, ...]] = []
    for step in range(length):
        extended = [(*walk, int(node)) for walk in walks for node in np.flatnonzero(graph.edges[walk[-1]])]
        done += [walk for walk in extended if walk[-1] == GOAL]
        walks = [walk for walk in extended if step + 1 + graph.distances[walk[-1]] <= length and walk[-1] != GOAL]
        if len(done) + len(walks) > MOST_WALKS:
            raise InputError(f"There are over {MOST_WALKS} walks of {length} steps; take fewer, or fewer edges a node.")
    padded = np.array([walk + (GOAL,) * (length + 1 - len(walk)) for walk in sorted(done)], np.int32)
    return as_rollout(padded[:, 0], padded[:, 1:])


class Walking(NamedTuple):
    """A problem of the walks.

    Attributes:
        ref_params: of the Transformer that walks as if by chance, with a value head.
        edges: bool [V, V].
        distances: int32 [V].
        walks: all that is rewarded, and repetitions to fill W.
        real: false on the repetitions. bool [W].
    """

    ref_params: PyTree
    edges: Array
    distances: Array
    walks: Rollout
    real: Array


def walks_task(
    graphs: list[Graph], config: TransformerConfig, length: int, *, updates: int, batch: int = 64, evaluated: int = 16
) -> Task:
    """Reach the goal by a short walk. A Transformer writes the walk, node by node, after the start.

    Its expected reward is exact, by the probability of every walk that is rewarded; its KL is a mean over samples of
    the exact KL of each token.

    Args:
        graphs: of V nodes each, a problem each. [S].
        config: of the Transformer.
        length: C.
        updates: of the reference policies, see `pretrain_walker`.
        batch: walks in each.
        evaluated: completions of each start that the KL is taken over.
    """
    plain, starts = Sampling(length, eos=(GOAL,)), jnp.arange(1, config.vocab_size)

    def sample(params: PyTree, problem: Walking, key: Array, prompts: int, group_size: int) -> Rollout:
        del problem
        starts_key, key = jax.random.split(key)
        chosen = jax.random.choice(starts_key, starts, (prompts, 1))
        sampling = dataclasses.replace(plain, group_size=group_size)
        return generate(params, key, chosen, jnp.ones(chosen.shape, bool), config, sampling)

    def walk_logprobs(params: PyTree, problem: Walking) -> Array:
        """-inf for the repetitions. [W]."""
        logprobs = jnp.sum(completion_logprobs(params, problem.walks, config, plain), axis=1)
        return jnp.where(problem.real, logprobs, -jnp.inf)

    def reward(problem: Walking, rollout: Rollout) -> Array:
        return walk_rewards(rollout, problem.edges, problem.distances)

    def evaluate(params: PyTree, problem: Walking, key: Array) -> Metrics:
        sampling = dataclasses.replace(plain, group_size=evaluated)
        rollout = generate(params, key, starts[:, None], jnp.ones((len(starts), 1), bool), config, sampling)
        _, context = reference_scores(problem.ref_params, rollout, config, plain)
        kl = make_score_fn(problem.ref_params, config, plain)(params, rollout, context).kl
        rewarded = jnp.exp(walk_logprobs(params, problem)) * reward(problem, problem.walks)
        return {"reward": jnp.sum(rewarded) / len(starts), "kl": jnp.sum(kl) / len(kl)}

    def best(problem: Walking, kl_coefficient: float | Array) -> Array:
        logprobs, rewards = walk_logprobs(problem.ref_params, problem), reward(problem, problem.walks)
        return best_of_walks(logprobs, rewards, problem.walks.prompts[:, 0] - 1, len(starts), kl_coefficient)

    def variance(problem: Walking) -> Array:
        probabilities, rewards = jnp.exp(walk_logprobs(problem.ref_params, problem)), reward(problem, problem.walks)
        moments = jnp.stack([probabilities * rewards, probabilities * rewards**2], axis=1)
        means, squares = jax.ops.segment_sum(moments, problem.walks.prompts[:, 0], config.vocab_size).T
        return jnp.sum(squares - means**2) / len(starts)

    problems = walking_problems(graphs, config, length, updates, batch)
    return Task(
        problems=problems,
        sample=sample,
        reward=reward,
        reference=lambda problem, rollout: reference_scores(problem.ref_params, rollout, config, plain),
        make_score_fn=lambda problem: make_score_fn(problem.ref_params, config, plain),
        evaluate=evaluate,
        best=best,
        prompts=config.vocab_size,
        unit=float(np.sqrt(np.mean(make_sweep(variance, make_mesh())(problems)))),
    )


def walking_problems(graphs: list[Graph], config: TransformerConfig, length: int, updates: int, batch: int) -> Walking:
    """The graphs with everything that is rewarded on them, and reference policies trained side by side. [S, ...]."""
    edges, distances = (np.stack(arrays) for arrays in zip(*graphs, strict=True))

    def train(given: tuple[Array, Array]) -> PyTree:
        seed, edges = given
        return pretrain_walker(seed, edges, config, length, updates, batch)

    every = [successful_walks(graph, length) for graph in graphs]
    most = max(len(walks.truncated) for walks in every)
    rows = [np.arange(most) % len(walks.truncated) for walks in every]
    padded = [jax.tree.map(lambda x, row=row: x[row], walks) for walks, row in zip(every, rows, strict=True)]
    return Walking(
        ref_params=make_sweep(train, make_mesh())((np.arange(len(graphs)), edges)),
        edges=jnp.asarray(edges),
        distances=jnp.asarray(distances),
        walks=jax.tree.map(lambda *parts: jnp.stack(parts), *padded),
        real=jnp.asarray([np.arange(most) < len(walks.truncated) for walks in every]),
    )


def best_of_walks(logprobs: Array, rewards: Array, starts: Array, prompts: int, kl_coefficient: float | Array) -> Array:
    """The most of E[reward] - kl_coefficient * KL, kl_coefficient * log E_ref[exp(reward / kl_coefficient)].

    What is not among the walks has no reward, so that the expectation needs only their probabilities.

    Args:
        logprobs: of the rewarded walks under the reference. [W].
        rewards: of these. [W].
        starts: the prompt of each, 0 to N - 1. int32 [W].
        prompts: N, over which the mean is taken.
        kl_coefficient: above 0, reward units a nat.
    """
    probabilities = jnp.exp(logprobs)
    highest = jnp.max(rewards)  # taken out of the exponents, which could overflow
    gained = probabilities * jnp.exp((rewards - highest) / kl_coefficient)
    others = 1 - jax.ops.segment_sum(probabilities, starts, prompts)
    total = jax.ops.segment_sum(gained, starts, prompts) + jnp.maximum(others, 0) * jnp.exp(-highest / kl_coefficient)
    return highest + kl_coefficient * jnp.mean(jnp.log(total))


def pretrain_walker(
    seed: Array, edges: Array, config: TransformerConfig, length: int, updates: int, batch: int
) -> PyTree:
    """A Transformer with a value head that walks as if by chance, by maximum likelihood of random walks.

    That is REINFORCE with an advantage of 1 for whatever is shown: fresh walks along the edges, bool [V, V], in each
    update. Adam's rate falls from 0.01 to 0.
    """
    optimizer = optax.flatten(optax.adam(optax.cosine_decay_schedule(0.01, updates)))
    sampling = Sampling(length, eos=(GOAL,))

    def score_fn(params: PyTree, rollout: Rollout, context: Any) -> Scores:
        del context
        return score_completions(params, rollout, config, sampling)

    def update(state: TrainState, step: Array) -> tuple[TrainState, Array]:
        starts_key, key = jax.random.split(step_key(seed, Purpose.SAMPLE, step))
        starts = jax.random.randint(starts_key, (batch,), 1, config.vocab_size)
        walks = random_walks(key, edges, starts, length)
        grads, metrics = reinforce_gradient(state.params, walks, jnp.ones(batch), score_fn, normalize="token")
        return apply_gradients(state, grads, optimizer)[0], metrics["loss"]

    state = init_state(init_params(step_key(seed, Purpose.INIT), config), optimizer, kl_coefficient=0.0)
    return add_value_head(jax.lax.scan(update, state, jnp.arange(updates))[0].params, config)


class Bandit(NamedTuple):
    """A problem of the bandit.

    Attributes:
        ref_params: {"table": logits [N, 1, V], "values": [N, 1]}.
        rewards: of each arm in each context. [N, V].
    """

    ref_params: PyTree
    rewards: Array


def bandit_task(problems: int, contexts: int, arms: int) -> Task:
    """Choose one of V arms in each of N contexts: completions of one token, by a table of logits.

    Rewards and the reference's logits are normal numbers. Everything is exact. The problems' seeds are 0 to S - 1.
    """

    def make(seed: Array) -> Bandit:
        rewards_key, table_key = jax.random.split(step_key(seed, Purpose.INIT))
        rewards = jax.random.normal(rewards_key, (contexts, arms))
        return Bandit({"table": init_table(table_key, contexts, arms, 1), "values": jnp.zeros((contexts, 1))}, rewards)

    def sample(params: PyTree, problem: Bandit, key: Array, prompts: int, group_size: int) -> Rollout:
        del problem
        prompts_key, key = jax.random.split(key)
        chosen = jnp.repeat(jax.random.randint(prompts_key, (prompts,), 0, contexts), group_size)
        tokens, logprobs = draw(params["table"][chosen, 0], jax.random.uniform(key, chosen.shape))
        return Rollout(
            prompts=chosen[:, None],
            prompt_mask=jnp.ones((len(chosen), 1), bool),
            completions=tokens[:, None],
            completion_mask=jnp.ones((len(chosen), 1), bool),
            behavior_logprobs=logprobs[:, None],
            truncated=jnp.zeros(len(chosen), bool),
        )

    def reference(problem: Bandit, rollout: Rollout) -> tuple[Array, Array]:
        logits = tabular_logits(problem.ref_params["table"], rollout)
        return token_logprobs(logits, rollout.completions), logits

    def score(params: PyTree, rollout: Rollout, ref_logits: Array) -> Scores:
        logits = tabular_logits(params["table"], rollout)
        logprobs, kl = token_logprobs(logits, rollout.completions), exact_kl(logits, ref_logits)
        return Scores(logprobs, entropy(logits), kl, tabular_values(params["values"], rollout, arms))

    def arm_logprobs(params: PyTree) -> Array:
        return jax.nn.log_softmax(params["table"][..., 0, :])

    def evaluate(params: PyTree, problem: Bandit, key: Array) -> Metrics:
        del key
        logprobs, ref_logprobs = arm_logprobs(params), arm_logprobs(problem.ref_params)
        reward = objective(logprobs, ref_logprobs, problem.rewards, 0.0)
        return {"reward": reward, "kl": reward - objective(logprobs, ref_logprobs, problem.rewards, 1.0)}

    every = jax.vmap(make)(jnp.arange(problems))
    probabilities = jnp.exp(arm_logprobs(every.ref_params))
    means = jnp.sum(probabilities * every.rewards, axis=-1, keepdims=True)
    return Task(
        problems=every,
        sample=sample,
        reward=lambda problem, rollout: problem.rewards[rollout.prompts[:, 0], rollout.completions[:, 0]],
        reference=reference,
        make_score_fn=lambda problem: score,
        evaluate=evaluate,
        best=lambda problem, coefficient: optimal_policy(
            arm_logprobs(problem.ref_params), problem.rewards, coefficient
        )[1],
        prompts=contexts,
        unit=float(jnp.sqrt(jnp.mean(jnp.sum(probabilities * (every.rewards - means) ** 2, axis=-1)))),
    )
