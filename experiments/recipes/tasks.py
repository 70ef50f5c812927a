"""Tasks whose optimum is known, small enough for hundreds of runs: walks on a graph, and a contextual bandit.

Letters: N prompts, B sequences, C completion length, V vocabulary, W walks that there are.
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
from rl_jax.models.tabular import init_table, tabular_logits, tabular_values
from rl_jax.models.transformer import TransformerConfig, add_value_head, init_params
from rl_jax.reinforce.distributions import entropy, exact_kl, token_logprobs
from rl_jax.reinforce.exact import objective, optimal_policy
from rl_jax.reinforce.gradient import ScoreFn, Scores, reinforce_gradient
from rl_jax.rollout import generate
from rl_jax.run.spmd import make_mesh, pmapped
from rl_jax.sampling import Sampling, draw
from rl_jax.scoring import completion_logprobs, make_score_fn, reference_scores, score_completions
from rl_jax.sweep import scan_updates
from rl_jax.types import Array, Metrics, PyTree, Rollout, TrainState


class Task(NamedTuple):
    """What an algorithm has to deal with, and how far it may get. All functions are pure.

    Attributes:
        ref_params: of the reference policy, from which every run starts.
        sample: params, key, number of prompts, completions of each -> a Rollout of random prompts.
        reward: Rollout -> [B].
        reference: ref_params, Rollout -> log-probabilities under the reference [B, C], and the ScoreFn's context.
        make_score_fn: ref_params -> a ScoreFn, with values.
        evaluate: params, ref_params, key -> {"reward": [], "kl": []}, means over all prompts.
        best_reward: the most that any policy can get.
        best_objective: kl_coefficient -> the most of reward - kl_coefficient * KL.
    """

    ref_params: PyTree
    sample: Callable[[PyTree, Array, int, int], Rollout]
    reward: Callable[[Rollout], Array]
    reference: Callable[[PyTree, Rollout], tuple[Array, Any]]
    make_score_fn: Callable[[PyTree], ScoreFn]
    evaluate: Callable[[PyTree, PyTree, Array], Metrics]
    best_reward: float
    best_objective: Callable[[float], float]


GOAL = 0  # the node that ends a walk: its token is the end-of-sequence token


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
        degree: how many edges lead from a node on average; every node has one at least.
        length: C, the most steps that the shortest walk from any node takes.

    Raises:
        InputError: no graph of a thousand has the goal in reach of all.
    """
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        edges = rng.random((nodes, nodes)) < degree / (nodes - 1)
        np.fill_diagonal(edges, False)
        lonely = np.flatnonzero(~edges.any(axis=1))
        edges[lonely, (lonely + rng.integers(1, nodes, len(lonely))) % nodes] = True
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

    Args:
        rollout: prompts are start nodes [B, 1], completions the nodes walked to. [B, C].
        edges: bool [V, V].
        distances: int32 [V].

    Returns:
        [B], at most 1.
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
    """Every walk along edges that reaches the goal within C steps, from every start: all that is rewarded. B = W."""
    walks: list[tuple[int, ...]] = [(node,) for node in range(1, len(graph.edges))]
    done: list[tuple[int, ...]] = []
    for step in range(length):
        extended = [(*walk, int(node)) for walk in walks for node in np.flatnonzero(graph.edges[walk[-1]])]
        done += [walk for walk in extended if walk[-1] == GOAL]
        walks = [walk for walk in extended if step + 1 + graph.distances[walk[-1]] <= length and walk[-1] != GOAL]
    padded = np.array([walk + (GOAL,) * (length + 1 - len(walk)) for walk in sorted(done)], np.int32)
    return as_rollout(padded[:, 0], padded[:, 1:])


def walks_task(graph: Graph, ref_params: PyTree, config: TransformerConfig, length: int, evaluated: int = 16) -> Task:
    """Reach the goal by a short walk. A Transformer writes the walk, node by node, after the start.

    Its expected reward is exact, by the probability of every walk that is rewarded; its KL is a mean over samples of
    the exact KL of each token.

    Args:
        graph: from `random_graph`.
        ref_params: from `pretrain_walker`.
        config: of the Transformer.
        length: C.
        evaluated: completions of each start that the KL is taken over.
    """
    edges, distances = jnp.asarray(graph.edges), jnp.asarray(graph.distances)
    starts = jnp.arange(1, len(graph.edges))
    plain = Sampling(length, eos=(GOAL,))
    walks = successful_walks(graph, length)
    walk_reward = walk_rewards(walks, edges, distances)

    def sample(params: PyTree, key: Array, prompts: int, group_size: int) -> Rollout:
        starts_key, key = jax.random.split(key)
        chosen = jax.random.choice(starts_key, starts, (prompts, 1))
        sampling = dataclasses.replace(plain, group_size=group_size)
        return generate(params, key, chosen, jnp.ones(chosen.shape, bool), config, sampling)

    def walk_logprobs(params: PyTree) -> Array:
        return jnp.sum(completion_logprobs(params, walks, config, plain), axis=1)

    def evaluate(params: PyTree, ref_params: PyTree, key: Array) -> Metrics:
        sampling = dataclasses.replace(plain, group_size=evaluated)
        rollout = generate(params, key, starts[:, None], jnp.ones((len(starts), 1), bool), config, sampling)
        _, context = reference_scores(ref_params, rollout, config, plain)
        kl = make_score_fn(ref_params, config, plain)(params, rollout, context).kl
        expected = jnp.sum(jnp.exp(walk_logprobs(params)) * walk_reward) / len(starts)
        return {"reward": expected, "kl": jnp.sum(kl) / len(kl)}

    def best_objective(kl_coefficient: float) -> float:
        logprobs = pmapped(walk_logprobs, make_mesh(jax.devices()[:1]), (None,), None)(ref_params)
        return float(best_of_walks(logprobs, walk_reward, walks.prompts[:, 0] - 1, len(starts), kl_coefficient))

    return Task(
        ref_params=ref_params,
        sample=sample,
        reward=lambda rollout: walk_rewards(rollout, edges, distances),
        reference=lambda ref_params, rollout: reference_scores(ref_params, rollout, config, plain),
        make_score_fn=lambda ref_params: make_score_fn(ref_params, config, plain),
        evaluate=evaluate,
        best_reward=1.0,
        best_objective=best_objective,
    )


def best_of_walks(logprobs: Array, rewards: Array, starts: Array, prompts: int, kl_coefficient: float) -> Array:
    """The most of E[reward] - kl_coefficient * KL, kl_coefficient * log E_ref[exp(reward / kl_coefficient)].

    What is not among the walks has no reward, so that the expectation needs only their probabilities.

    Args:
        logprobs: of the rewarded walks under the reference. [W].
        rewards: of these. [W].
        starts: the prompt of each, 0 to N - 1. int32 [W].
        prompts: N.
        kl_coefficient: above 0, reward units a nat.

    Returns:
        The mean over the prompts. [].
    """
    probabilities = jnp.exp(logprobs)
    highest = jnp.max(rewards)  # taken out of the exponents, which could overflow
    gained = probabilities * jnp.exp((rewards - highest) / kl_coefficient)
    others = 1 - jax.ops.segment_sum(probabilities, starts, prompts)
    total = jax.ops.segment_sum(gained, starts, prompts) + jnp.maximum(others, 0) * jnp.exp(-highest / kl_coefficient)
    return highest + kl_coefficient * jnp.mean(jnp.log(total))


def pretrain_walker(
    graph: Graph, config: TransformerConfig, length: int, updates: int, batch: int, seed: int
) -> PyTree:
    """A Transformer with a value head that walks as if by chance, by maximum likelihood of random walks.

    That is REINFORCE with an advantage of 1 for whatever is shown.

    Args:
        graph: whose edges are walked.
        config: of the Transformer.
        length: C.
        updates: of Adam, at a rate of 0.01 that falls to 0.
        batch: fresh walks in each.
        seed: of the initial parameters and the walks.
    """
    optimizer = optax.flatten(optax.adam(optax.cosine_decay_schedule(0.01, updates)))
    edges, sampling = jnp.asarray(graph.edges), Sampling(length, eos=(GOAL,))

    def score_fn(params: PyTree, rollout: Rollout, context: Any) -> Scores:
        del context
        return score_completions(params, rollout, config, sampling)

    def update(state: TrainState, step: Array) -> tuple[TrainState, Array]:
        starts_key, key = jax.random.split(step_key(seed, Purpose.SAMPLE, step))
        starts = jax.random.randint(starts_key, (batch,), 1, len(edges))
        walks = random_walks(key, edges, starts, length)
        grads, metrics = reinforce_gradient(state.params, walks, jnp.ones(batch), score_fn, normalize="token")
        return apply_gradients(state, grads, optimizer)[0], metrics["loss"]

    def train(params: PyTree) -> PyTree:
        return scan_updates(update, init_state(params, optimizer), updates)[0].params

    params = init_params(step_key(seed, Purpose.INIT), config)
    return add_value_head(pmapped(train, make_mesh(jax.devices()[:1]), (None,), None)(params), config)


def bandit_task(seed: int, contexts: int, arms: int) -> Task:
    """Choose one of V arms in each of N contexts: completions of one token, by a table of logits.

    Rewards and the reference's logits are normal numbers; the rewards of a context share one more, so that contexts
    differ as prompts do. Everything is exact.

    Args:
        seed: of the rewards and the reference.
        contexts: N.
        arms: V.
    """
    keys = jax.random.split(step_key(seed, Purpose.INIT), 3)
    rewards = jax.random.normal(keys[0], (contexts, arms)) + jax.random.normal(keys[1], (contexts, 1))
    ref_params = {"table": init_table(keys[2], contexts, arms, 1), "values": jnp.zeros((contexts, 1))}

    def sample(params: PyTree, key: Array, prompts: int, group_size: int) -> Rollout:
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

    def reference(ref_params: PyTree, rollout: Rollout) -> tuple[Array, Array]:
        logits = tabular_logits(ref_params["table"], rollout)
        return token_logprobs(logits, rollout.completions), logits

    def score(params: PyTree, rollout: Rollout, ref_logits: Array) -> Scores:
        logits = tabular_logits(params["table"], rollout)
        logprobs, kl = token_logprobs(logits, rollout.completions), exact_kl(logits, ref_logits)
        return Scores(logprobs, entropy(logits), kl, tabular_values(params["values"], rollout, arms))

    def arm_logprobs(params: PyTree) -> Array:
        return jax.nn.log_softmax(params["table"][:, 0])

    def evaluate(params: PyTree, ref_params: PyTree, key: Array) -> Metrics:
        del key
        logprobs, ref_logprobs = arm_logprobs(params), arm_logprobs(ref_params)
        reward = objective(logprobs, ref_logprobs, rewards, 0.0)
        return {"reward": reward, "kl": reward - objective(logprobs, ref_logprobs, rewards, 1.0)}

    return Task(
        ref_params=ref_params,
        sample=sample,
        reward=lambda rollout: rewards[rollout.prompts[:, 0], rollout.completions[:, 0]],
        reference=reference,
        make_score_fn=lambda ref_params: score,
        evaluate=evaluate,
        best_reward=float(jnp.mean(jnp.max(rewards, axis=1))),
        best_objective=lambda coefficient: float(optimal_policy(arm_logprobs(ref_params), rewards, coefficient)[1]),
    )
