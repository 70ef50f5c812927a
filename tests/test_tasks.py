"""Tasks with a known optimum, against the enumeration of everything that a policy can do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from experiments.recipes import compare_estimators_tasks as tasks
from experiments.recipes.compare_estimators_tasks import Graph, bandit_task, walk_rewards
from rl_jax.errors import InputError
from rl_jax.models.config import llama
from rl_jax.models.transformer import init_params
from rl_jax.reinforce import exact
from rl_jax.sampling import Sampling
from rl_jax.scoring import completion_logprobs

LENGTH = 3
EDGES = np.array([[0, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0]], bool)  # 1 -> 0 or 2; 2 -> 0, 3; 3 -> 1, 2
GRAPH = Graph(EDGES, np.array([0, 1, 1, 2], np.int32))
CONFIG = llama(vocab_size=4, context=4, layers=1, width=8, heads=2, mlp_width=8)
PARAMS, REF_PARAMS = (
    jax.tree.map(lambda x: 15 * x if x.ndim > 1 else x, init_params(jax.random.key(seed), CONFIG)) for seed in (0, 1)
)
STARTS = np.array([[1], [2], [3]], np.int32)
EVERY = exact.enumerated_rollout(STARTS, np.ones((3, 1), bool), 4, LENGTH, (0,))
DENSE = Graph(np.array([[False] * 4, *[[True] * 4] * 3]) & ~np.eye(4, dtype=bool), np.array([0, 1, 1, 1], np.int32))
BANDIT = bandit_task(2, contexts=3, arms=5)
PROBLEM = jax.tree.map(lambda x: x[1], BANDIT.problems)


@functools.cache
def walking():
    """A task of two graphs, of which the second has fewer walks."""
    return tasks.walks_task([DENSE, GRAPH], CONFIG, LENGTH, updates=200, evaluated=4000)


def walking_problem():
    """The second problem, with the reference policy of `enumerated`."""
    return jax.tree.map(lambda x: x[1], walking().problems)._replace(ref_params=REF_PARAMS)


@functools.cache
def enumerated():
    """Of every completion of every start: log-probabilities of policy and reference, and rewards. [3, K] each."""
    score = jax.jit(lambda params: completion_logprobs(params, EVERY, CONFIG, Sampling(LENGTH)))
    logprobs = (exact.sequence_logprobs(score(params), EVERY.completion_mask, 3) for params in (PARAMS, REF_PARAMS))
    return *logprobs, walk_rewards(EVERY, jnp.asarray(EDGES), jnp.asarray(GRAPH.distances)).reshape(3, -1)


def test_graphs_lead_to_the_goal_by_the_distances_they_tell():
    graph = tasks.random_graph(0, nodes=21, degree=2, length=8)
    edges, distances = graph.edges.astype(int), graph.distances
    reached = [np.linalg.matrix_power(edges, steps)[:, 0] > 0 for steps in range(9)]
    assert [int(np.argmax(node)) for node in np.array(reached).T] == distances.tolist()
    assert not edges[0].any() and not edges.diagonal().any() and edges[1:].any(axis=1).all()
    assert 2 <= distances.max() <= 8 and 25 < edges.sum() < 60
    assert not np.array_equal(edges, tasks.random_graph(2, 21, 2, 8).edges)


def test_graph_that_cannot_be_drawn_is_refused():
    with pytest.raises(InputError, match="No graph of 30 nodes"):
        tasks.random_graph(0, nodes=30, degree=1, length=1)


def test_walk_rewards_by_hand():
    walks = [(3, 1, 0, 0), (3, 2, 0, 0), (1, 2, 0, 0), (2, 3, 1, 0), (3, 0, 0, 0), (2, 3, 2, 3), (1, 0, 0, 0)]
    rollout = tasks.as_rollout(np.array(walks)[:, 0], np.array(walks)[:, 1:])
    rewards = walk_rewards(rollout, jnp.asarray(EDGES), jnp.asarray(GRAPH.distances))
    np.testing.assert_allclose(rewards, [1, 1, 1 / 2, 1 / 3, 0, 0, 1], rtol=1e-6)
    assert rollout.truncated.tolist() == [False] * 5 + [True, False]
    assert rollout.completion_mask.sum(axis=1).tolist() == [2, 2, 2, 3, 1, 3, 1]


def test_successful_walks_are_all_that_is_rewarded():
    walks = tasks.successful_walks(GRAPH, LENGTH)
    rewards = np.asarray(walk_rewards(walks, jnp.asarray(EDGES), jnp.asarray(GRAPH.distances)))
    found = np.column_stack([walks.prompts, walks.completions, walks.completion_mask])
    rewarded = np.asarray(enumerated()[2]).reshape(-1) > 0
    wanted = np.column_stack([EVERY.prompts, EVERY.completions, EVERY.completion_mask])[rewarded]
    assert rewards.min() > 0
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, wanted.tolist()))


def test_random_walks_take_every_edge_alike():
    walks = tasks.random_walks(jax.random.key(0), jnp.asarray(EDGES), jnp.full(4000, 3), LENGTH)
    before = np.column_stack([walks.prompts, walks.completions[:, :-1]])[np.asarray(walks.completion_mask)]
    pairs = np.zeros((4, 4))
    np.add.at(pairs, (before, np.asarray(walks.completions)[np.asarray(walks.completion_mask)]), 1)
    assert np.array_equal(pairs > 0, EDGES)
    shares = pairs[1:] / pairs[1:].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares[EDGES[1:]], 0.5, atol=0.05)


def test_what_may_be_walked_is_bounded():
    edges = np.ones((9, 9), bool)
    edges[0] = False
    with pytest.raises(InputError, match="over 20000 walks of 8 steps"):
        tasks.successful_walks(Graph(edges, np.minimum(np.arange(9), 1)), 8)


@pytest.mark.parametrize("coefficient", [pytest.param(0.05, marks=pytest.mark.slow), 0.5])
def test_optimum_of_walks_is_that_of_everything_a_policy_can_do(coefficient):
    _, ref_logprobs, rewards = enumerated()
    _, best = exact.optimal_policy(ref_logprobs, rewards, coefficient)
    got = jax.jit(walking().best)(walking_problem(), coefficient)
    np.testing.assert_allclose(got, best, rtol=1e-5)


def test_walks_are_evaluated_exactly_in_reward_and_by_samples_in_divergence():
    logprobs, ref_logprobs, rewards = enumerated()
    got = jax.jit(walking().evaluate)(PARAMS, walking_problem(), jax.random.key(0))
    np.testing.assert_allclose(got["reward"], np.mean(np.sum(np.exp(logprobs) * rewards, axis=1)), rtol=1e-5)
    np.testing.assert_allclose(got["kl"], np.mean(exact.sequence_kl(logprobs, ref_logprobs)), rtol=0.05)
    assert got["kl"] > 0.1


def test_unit_of_walks_is_the_deviation_of_rewards_of_a_start():
    task, variances = walking(), []
    for number in range(2):
        problem = jax.tree.map(lambda x, number=number: x[number], task.problems)
        rollout = jax.jit(task.sample, static_argnums=(3, 4))(problem.ref_params, problem, jax.random.key(0), 600, 4)
        starts, rewards = np.asarray(rollout.prompts[:, 0]), np.asarray(task.reward(problem, rollout))
        variances.append(np.mean([rewards[starts == start].var() for start in (1, 2, 3)]))
    assert task.unit == pytest.approx(np.sqrt(np.mean(variances)), rel=0.05) and task.prompts == 4


def test_walks_are_sampled_in_groups_from_every_start():
    problem = walking_problem()
    rollout = jax.jit(walking().sample, static_argnums=(3, 4))(PARAMS, problem, jax.random.key(0), 200, 2)
    starts = np.asarray(rollout.prompts).reshape(200, 2)
    assert (starts[:, 0] == starts[:, 1]).all() and set(starts[:, 0]) == {1, 2, 3}
    assert len(np.unique(rollout.completions[::2] - rollout.completions[1::2])) > 1
    by_hand = walk_rewards(rollout, jnp.asarray(EDGES), jnp.asarray(GRAPH.distances))
    np.testing.assert_array_equal(walking().reward(problem, rollout), by_hand)


@pytest.mark.parametrize(("number", "graph", "edges", "gap"), [(0, DENSE, 3, 0.2), (1, GRAPH, 2, 0.05)])
def test_references_learn_to_walk_their_graph_by_chance(number, graph, edges, gap):
    """The cross-entropy falls from log 4 towards that of the walks: log of the edges a node."""
    params = jax.tree.map(lambda x: x[number], walking().problems.ref_params)
    starts = jnp.tile(jnp.arange(1, 4), 300)
    walks = tasks.random_walks(jax.random.key(1), jnp.asarray(graph.edges), starts, LENGTH)
    score = jax.jit(lambda params, walks: completion_logprobs(params, walks, CONFIG, Sampling(LENGTH)))
    loss = -score(params, walks).sum() / walks.completion_mask.sum()
    assert np.log(edges) - 0.02 < loss < np.log(edges) + gap
    assert "value_head" in params


def test_bandit_is_evaluated_by_its_table():
    params = {"table": jax.random.normal(jax.random.key(5), (3, 1, 5))}
    probabilities = np.asarray(jax.nn.softmax(params["table"][:, 0]))
    ref = np.asarray(jax.nn.softmax(PROBLEM.ref_params["table"][:, 0]))
    every = exact.enumerated_rollout(np.arange(3)[:, None], np.ones((3, 1), bool), 5, 1, ())
    rewards = np.asarray(BANDIT.reward(PROBLEM, every)).reshape(3, 5)
    got = BANDIT.evaluate(params, PROBLEM, jax.random.key(0))
    np.testing.assert_allclose(got["reward"], (probabilities * rewards).sum(axis=1).mean(), rtol=1e-5)
    divergence = (probabilities * np.log(probabilities / ref)).sum(axis=1).mean()
    np.testing.assert_allclose(got["kl"], divergence, rtol=1e-4)
    assert not np.array_equal(*BANDIT.problems.rewards) and not np.array_equal(*BANDIT.problems.ref_params["table"])


def test_rewards_of_the_bandit_differ_by_their_unit_within_a_context_and_little_between():
    task = bandit_task(1, contexts=60, arms=50)
    problem = jax.tree.map(lambda x: x[0], task.problems)
    rollout = task.sample(problem.ref_params, problem, jax.random.key(0), 4000, 8)
    rewards = np.asarray(task.reward(problem, rollout)).reshape(-1, 8)
    assert task.unit == pytest.approx(np.sqrt(rewards.var(axis=1, ddof=1).mean()), rel=0.02) and task.prompts == 60
    assert 0.9 < np.std(problem.rewards) < 1.1 and np.std(problem.rewards.mean(axis=1)) < 0.2


def test_optimum_of_the_bandit_is_reached_by_the_tilted_reference():
    every = exact.enumerated_rollout(np.arange(3)[:, None], np.ones((3, 1), bool), 5, 1, ())
    rewards = BANDIT.reward(PROBLEM, every).reshape(3, 1, 5)
    best = float(BANDIT.best(PROBLEM, 0.3))
    for change, gap in ((0.0, 0.0), (0.3, 0.003), (-0.3, 0.003)):
        tilted = {"table": PROBLEM.ref_params["table"] + rewards / 0.3 + change * jnp.arange(5.0)[None, None]}
        got = BANDIT.evaluate(tilted, PROBLEM, jax.random.key(0))
        reached = got["reward"] - 0.3 * got["kl"]
        assert reached == pytest.approx(best, abs=1e-5) if gap == 0 else reached < best - gap


def test_bandit_samples_from_its_policy_and_scores_what_it_sampled():
    rollout = BANDIT.sample(PROBLEM.ref_params, PROBLEM, jax.random.key(0), 6000, 2)
    contexts, tokens = np.asarray(rollout.prompts[:, 0]), np.asarray(rollout.completions[:, 0])
    assert (contexts.reshape(-1, 2)[:, 0] == contexts.reshape(-1, 2)[:, 1]).all()
    shares = np.array([np.bincount(tokens[contexts == c], minlength=5) for c in range(3)], float)
    shares /= shares.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, jax.nn.softmax(PROBLEM.ref_params["table"][:, 0]), atol=0.03)
    ref_logprobs, context = BANDIT.reference(PROBLEM, rollout)
    np.testing.assert_allclose(ref_logprobs, rollout.behavior_logprobs, atol=1e-5)
    params = {"table": PROBLEM.ref_params["table"][::-1], "values": jnp.arange(3.0)[:, None]}
    scores = BANDIT.make_score_fn(PROBLEM)(params, rollout, context)
    flipped, plain = (jax.nn.log_softmax(x["table"][:, 0]) for x in (params, PROBLEM.ref_params))
    np.testing.assert_allclose(scores.logprobs[:, 0], flipped[contexts, tokens], rtol=1e-5)
    np.testing.assert_allclose(scores.kl[:, 0], oracles.sequence_kl(flipped, plain)[contexts], rtol=1e-4)
    np.testing.assert_array_equal(scores.values[:, 0], contexts)
    np.testing.assert_allclose(scores.entropy[:, 0], -(jnp.exp(flipped) * flipped).sum(axis=1)[contexts], rtol=1e-5)
