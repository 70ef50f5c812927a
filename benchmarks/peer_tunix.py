"""The Tunix contender: its sampler, and its GRPO learner with that sampler, on its own Llama 3.

    build/peers/tunix/bin/python benchmarks/peer_tunix.py '{"task": "generate", "shape": "A", "dtype": "float32"}'

Its sampler takes strings. Here a prompt is its token ids in decimal, and BOS has no id, so that none is prepended. EOS
and padding have the id V, which is not in the model's vocabulary: every completion has the full length, and no token
that was sampled is taken for padding.
"""

import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# glibc reads these before Python begins: memory that is freed is kept, and not given back and faulted in again.
SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "MALLOC_ARENA_MAX": "1",
    "JAX_PLATFORMS": "cpu",
}
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in SETTINGS.items()):
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | SETTINGS)

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from tunix.generate import sampler as tunix_sampler  # noqa: E402
from tunix.models.llama3 import model as llama3  # noqa: E402
from tunix.rl import rl_cluster  # noqa: E402
from tunix.rl.grpo import grpo_learner  # noqa: E402
from tunix.rl.rollout import base_rollout  # noqa: E402

from benchmarks.work import FIXED, FIXED_G, SHAPES, Shape, Work, random_prompts  # noqa: E402
from benchmarks.worker import Job, serve  # noqa: E402

HEAD = 64


class Numbers:
    """Reads and writes token ids as decimal numbers with spaces between."""

    def __init__(self, vocab_size: int) -> None:
        self.end = vocab_size

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return self.end

    def pad_id(self) -> int:
        return self.end


def work_of(shape: str, spread: bool) -> Work:
    """What the cases of a shape do."""
    if spread:
        raise NotImplementedError(
            "Tunix is compared at fixed lengths only: its Llama has no bias with which random weights end completions"
        )
    return FIXED_G if shape == "G" else FIXED


def random_llama(shape: Shape, dtype: str) -> llama3.Llama3:
    """Random weights; the MLP's width is near 8 D / 3, so that a block has as many parameters as one of GPT-2."""
    config = llama3.ModelConfig(
        num_layers=shape.layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.width,
        hidden_dim=16 * round(shape.width / 6),
        num_heads=shape.heads,
        head_dim=HEAD,
        num_kv_heads=shape.heads,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    graph, weights = nnx.split(llama3.Llama3(config, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    leaves = [
        (0.02 * jax.random.normal(key, leaf.shape) if leaf.ndim > 1 else leaf).astype(dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def prompt_strings(shape: Shape, work: Work, seed: int) -> list[str]:
    return [" ".join(map(str, prompt)) for prompt in random_prompts(shape, work, seed).tolist()]


def generate(shape: str, dtype: str, spread: bool = False) -> Job:
    """Samples a batch of completions with Tunix's sampler."""
    size, work = SHAPES[shape], work_of(shape, spread)
    sampler = tunix_sampler.Sampler(
        random_llama(size, dtype),
        Numbers(size.vocab_size),
        tunix_sampler.CacheConfig(
            cache_size=work.prompt_length + work.length,
            num_layers=size.layers,
            num_kv_heads=size.heads,
            head_dim=HEAD,
        ),
    )
    seeds = iter(range(10**9))

    def job() -> Mapping[str, Any]:
        seed = next(seeds)
        prompts = [prompt for prompt in prompt_strings(size, work, seed) for _ in range(work.group_size)]
        output = sampler(
            prompts,
            max_generation_steps=work.length,
            max_prompt_length=work.prompt_length,
            temperature=1.0,
            top_p=1.0,
            seed=seed,
        )
        lengths = [len(tokens) for tokens in output.tokens]
        assert lengths == [work.length] * work.prompts * work.group_size, lengths
        assert output.padded_prompt_tokens.shape[1] == work.prompt_length
        return {"tokens": sum(lengths), "longest": max(lengths)}

    job(), job()
    return job


def rl_step(shape: str, algorithm: str, spread: bool = False) -> Job:
    """One update of Tunix's GRPO learner, from the prompts to the new weights, with its own sampler."""
    if algorithm != "grpo":
        raise NotImplementedError(f"Tunix has no learner for {algorithm}")
    size, work = SHAPES[shape], work_of(shape, spread)
    begin: queue.Queue[None] = queue.Queue()
    end: queue.Queue[BaseException | None] = queue.Queue()
    lengths: list[int] = []
    prompts_seen: list[str] = []
    generating = [0.0]
    scored = [0]

    def even_tokens(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        tokens = [completion.split() for completion in completions]
        lengths[:] = map(len, tokens)
        return [sum(int(token) % 2 == 0 for token in words) / len(words) for words in tokens]

    def batches() -> Iterator[Mapping[str, np.ndarray]]:
        """The learner asks for the next batch when it has done with the last."""
        for seed in range(10**9):
            begin.get()
            cluster.cluster_config.rollout_config.seed = seed
            yield {"prompts": np.array(prompt_strings(size, work, seed))}
            end.put(None)

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=random_llama(size, "float32"),
        reference=random_llama(size, "float32"),
        tokenizer=Numbers(size.vocab_size),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            rollout_engine="vanilla",
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.chain(
                    optax.clip_by_global_norm(1.0), optax.adamw(work.learning_rate, weight_decay=0.0)
                ),
                eval_every_n_steps=10**9,
                max_steps=10**9,
                mini_batch_size=work.prompts,
                train_micro_batch_size=work.prompts,
            ),
            rollout_config=base_rollout.RolloutConfig(
                max_tokens_to_generate=work.length,
                max_prompt_length=work.prompt_length,
                kv_cache_size=work.prompt_length + work.length,
                temperature=1.0,
                top_p=1.0,
                top_k=None,
            ),
        ),
    )
    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        reward_fns=even_tokens,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=work.group_size, num_iterations=1, beta=work.kl_coefficient
        ),
    )
    cluster_generate, cluster_score = cluster.generate, cluster.get_ref_per_token_logps

    def timed_generate(prompts: Sequence[str], *others: Any, **options: Any) -> base_rollout.RolloutOutput:
        start = time.perf_counter()
        prompts_seen[:] = prompts[:: work.group_size]
        answer = cluster_generate(prompts, *others, **options)
        generating[0] = time.perf_counter() - start
        return answer

    def counted_score(*others: Any, **options: Any) -> jax.Array:
        scored[0] += 1
        return cluster_score(*others, **options)

    cluster.generate, cluster.get_ref_per_token_logps = timed_generate, counted_score

    def train() -> None:
        try:
            learner.train(batches())
        except BaseException as error:  # The thread that waits in `job` has to hear of it.
            end.put(error)

    threading.Thread(target=train, daemon=True).start()
    seeds = iter(range(10**9))

    def job() -> Mapping[str, Any]:
        before = scored[0]
        begin.put(None)
        if error := end.get():
            raise error
        jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
        assert scored[0] > before, "the reference was not evaluated"
        assert prompts_seen == prompt_strings(size, work, next(seeds)), "these are not the prompts of this step"
        assert lengths == [work.length] * work.prompts * work.group_size, lengths
        return {"tokens": sum(lengths), "longest": max(lengths), "generate_seconds": generating[0]}

    job(), job()
    return job


if __name__ == "__main__":
    serve({"generate": generate, "rl_step": rl_step})
    os._exit(0)  # A thread of the learner still waits for a batch, and the interpreter would wait for it.
