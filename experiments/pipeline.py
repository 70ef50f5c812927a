"""The main job: pretrain a language model, give it a reward, improve it with REINFORCE, compare before and after.

    python experiments/pipeline.py
    python experiments/pipeline.py --corpus my_texts/ --reward.names keyword --reward.keywords king gold

`pretrain.py` and `reinforce.py` are its two halves, each a script of its own.
"""

import dataclasses
import time
from pathlib import Path

from experiments.compare import compare
from experiments.options import describe_estimator
from experiments.pretrain import Pretraining, load_text, model_config, pretrain
from experiments.pretrain import check as check_pretraining
from experiments.reinforce import Reinforcing, make_sampling, reinforce, split_prompts
from experiments.reinforce import check as check_reinforcing
from rl_jax.models.huggingface import save_policy
from rl_jax.rewards.compose import RewardConfig, make_reward
from rl_jax.run.folder import check_run, open_run, write_json
from rl_jax.run.loop import run_main
from rl_jax.run.metrics import open_metrics
from rl_jax.run.results import report_if_stopped, timed, write_results


@dataclasses.dataclass(frozen=True)
class Config:
    """Pretrain a language model, give it a reward, improve it with REINFORCE, compare before and after."""

    run: Path = Path("runs/pipeline")
    """Folder that the run writes to."""
    resume: bool = False
    """Continue the run in that folder from its last checkpoint."""
    corpus: str = "bbe"
    """bbe (Bible in Basic English), sotu or chitchat; or a .txt, .jsonl or .parquet file, or a folder of them."""
    seed: int = 0
    """Seed of everything random but the held-out passages, which are the same for all seeds."""
    pretrain: Pretraining = Pretraining()
    reward: RewardConfig = RewardConfig()
    reinforce: Reinforcing = Reinforcing()


def main(config: Config) -> None:
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    model = model_config(config.pretrain)
    check_run(config.run, config, config.resume)
    text = load_text(config.corpus, config.pretrain.vocab_size, config.run / "policy" if config.resume else None)
    reward = make_reward(config.reward, text.tokenizer)
    prompts = split_prompts(config.reinforce, text.tokenizer, text.held_out)
    check_pretraining(config.pretrain, text, config.seed)
    check_reinforcing(config.reinforce, model, reward, prompts, text.tokenizer, config.seed)

    rl = config.reinforce
    estimator = describe_estimator(rl.estimator, rl.options, rl.group_size)
    run = open_run(config.run, "experiments/pipeline.py", config, estimator=estimator)
    text.tokenizer.save_pretrained(run / "policy")
    writer = open_metrics(run)
    with timed(seconds, "pretrain"), report_if_stopped(run):
        pretrained, summary = pretrain(config.pretrain, text, config.seed, run, writer)
    save_policy(run / "pretrained", pretrained)
    write_json(run / "summary.json", summary)  # for the report of a run that stops after this
    with timed(seconds, "rl"), report_if_stopped(run):
        tuned = reinforce(config.reinforce, pretrained, reward, prompts, config.seed, run, writer)
    save_policy(run / "policy", tuned)
    writer.close()
    sampling = make_sampling(config.reinforce, text.tokenizer.eos_token_id)
    with timed(seconds, "compare"):
        compared, pairs = compare(
            config.reinforce.compare, pretrained, tuned, reward, prompts.held_out, sampling, config.seed
        )
    spent = {"seconds": time.perf_counter() - start, "seconds_by_stage": seconds}
    write_results(run, summary | compared | spent | {"seed": config.seed}, pairs)


if __name__ == "__main__":
    run_main(main, Config)
