"""The named algorithms, each one row: an advantage function, a loss, what the loss is a mean of, and where the KL goes.

Every piece is a pure function of `advantages`, `objectives` and `penalties`, usable alone; `composition` puts them
together. To add an algorithm, write a row.
"""

from functools import partial
from typing import Any

from rl_jax.errors import InputError
from rl_jax.reinforce.advantages import (
    best_of_group_advantages,
    exponential_advantages,
    gae_advantages,
    greedy_advantages,
    group_mean_advantages,
    group_standardized_advantages,
    leave_one_out_advantages,
    moving_average_advantages,
    rewards_to_go,
    total_rewards,
)
from rl_jax.reinforce.composition import Estimator, with_options
from rl_jax.reinforce.objectives import (
    dual_clip_loss,
    ppo_clip_loss,
    sequence_clip_loss,
    sequence_importance_loss,
    token_importance_loss,
)

_PPO_CLIP = partial(ppo_clip_loss, clip_low=0.2, clip_high=0.2)
_GAE = partial(gae_advantages, discount=1.0, gae_lambda=0.95)
_EXACT = "E[r] - beta KL, unbiased"

ESTIMATORS = {
    "reinforce": Estimator(
        paper="Williams 1992",
        equation="A = r",
        target=_EXACT,
        differs="No baseline, no clip, no division by length: the bare score-function estimator, which TRL lacks.",
        advantages=total_rewards,
    ),
    "reinforce_moving_average": Estimator(
        paper="Sutton 1984; Williams 1992",
        equation="A = r - mean of the rewards of earlier steps",
        target=f"{_EXACT} after the first step, whose baseline is its own mean",
        differs="The baseline is made of the steps before, so that no sample enters its own.",
        advantages=partial(moving_average_advantages, baseline_decay=0.95),
    ),
    "reinforce_value": Estimator(
        paper="Williams 1992; Sutton 2000",
        equation="A_c = sum of the token rewards from c on - V(s_c)",
        target=f"{_EXACT}, whatever the critic says (a trunk that it shares has its gradient too)",
        differs="GAE with lambda = 1, one pass and no clip: PPO's critic without PPO's bias.",
        advantages=partial(gae_advantages, discount=1.0, gae_lambda=1.0),
    ),
    "reinforce_to_go": Estimator(
        paper="Sutton 2000, theorem 1; Baxter 2001",
        equation="A_c = sum over k >= 0 of gamma^k r_(c+k)",
        target=f"{_EXACT} with discount 1; below it, what comes late counts less",
        differs="A token is not charged the divergence of the tokens before it.",
        advantages=partial(rewards_to_go, discount=1.0),
    ),
    "rloo": Estimator(
        paper="Kool 2019; Ahmadian 2024, section 2.3",
        equation="A = r - mean of the others in the group",
        target=_EXACT,
        differs="No ratio and no clip. TRL clips the completion's ratio, Tunix and verl those of tokens.",
        advantages=leave_one_out_advantages,
    ),
    "remax": Estimator(
        paper="Li 2023, algorithm 1",
        equation="A = r - r(greedy completion)",
        target=_EXACT,
        differs="The greedy completion is not charged its divergence, which leaves the estimate unbiased.",
        advantages=greedy_advantages,
    ),
    "grpo": Estimator(
        paper="Shao 2024, eq. 3 and 4",
        equation="A = (r - group mean) / group std; min(rho A, clip(rho) A) / length; - beta k3",
        target="not E[r]: prompts weighed by 1 / std, tokens by 1 / length; the KL is the reverse one, by token",
        differs="As in the paper: one update a batch, a mean a sequence, k3. TRL's default is a token mean without KL.",
        advantages=group_standardized_advantages,
        loss=_PPO_CLIP,
        normalize="sequence",
        kl="k3_loss",
        kl_coefficient=0.04,
    ),
    "dr_grpo": Estimator(
        paper="Liu 2025, section 3.2",
        equation="A = r - group mean; min(rho A, clip(rho) A) / C",
        target="E[r], times (G - 1) / (G C)",
        differs="Divides by the longest completion there may be, not by a mean over the tokens of the batch.",
        advantages=group_mean_advantages,
        loss=_PPO_CLIP,
        normalize="constant",
        kl="none",
    ),
    "reinforce_pp": Estimator(
        paper="Hu 2025 (REINFORCE++)",
        equation="A_c = whitened sum of the token rewards from c on; min(rho A, clip(rho) A)",
        target="E[r] - beta KL, but for a mean that is shared and a random 1 / std",
        differs="No critic, yet PPO's clip; advantages are whitened over all tokens of the batch, not by device.",
        advantages=partial(rewards_to_go, discount=1.0),
        loss=_PPO_CLIP,
        normalize="token",
        whiten_advantages=True,
    ),
    "reinforce_pp_baseline": Estimator(
        paper="Hu 2025 (REINFORCE++-baseline)",
        equation="A = whitened (r - group mean); min(rho A, clip(rho) A); - beta k2",
        target="E[r], times (G - 1) / G and a random 1 / std; the KL is by token",
        differs="k2 in the loss, whose gradient is the KL's, where others take k3.",
        advantages=group_mean_advantages,
        loss=_PPO_CLIP,
        normalize="token",
        kl="k2_loss",
        whiten_advantages=True,
    ),
    "dapo": Estimator(
        paper="Yu 2025, eq. 8 to 13",
        equation="A = (r - group mean) / group std; min(rho A, clip(rho, 0.8, 1.28) A), mean over tokens",
        target="not E[r]: prompts weighed by 1 / std, those without signal replaced",
        differs="Groups without signal are replaced, as far as the rounds go; 2 updates a batch, not 16.",
        advantages=group_standardized_advantages,
        loss=partial(ppo_clip_loss, clip_low=0.2, clip_high=0.28),
        normalize="token",
        kl="none",
        overlong_share=0.2,
        sampling_rounds=4,
        minibatches=2,
    ),
    "cispo": Estimator(
        paper="MiniMax 2025, eq. 4 and 5",
        equation="A = (r - group mean) / group std; min(rho, cap) A log pi, mean over tokens",
        target="not E[r]: prompts weighed by 1 / std",
        differs="ratio_cap is 1 + the paper's epsilon, which it does not state; no lower bound; 2 updates, not 16.",
        advantages=group_standardized_advantages,
        loss=partial(token_importance_loss, ratio_cap=5.0),
        normalize="token",
        kl="none",
        minibatches=2,
    ),
    "gspo": Estimator(
        paper="Zheng 2025, eq. 5 to 7",
        equation="A = (r - group mean) / group std; s = exp(mean log rho); min(s A, clip(s) A)",
        target="not E[r]: prompts weighed by 1 / std, tokens by 1 / length",
        differs="The ratio is a geometric mean: clip ranges are a thousandth of PPO's. 2 updates a batch, not 4.",
        advantages=group_standardized_advantages,
        loss=partial(sequence_clip_loss, clip_low=3e-4, clip_high=4e-4),
        normalize="sequence",
        kl="none",
        minibatches=2,
    ),
    "ppo": Estimator(
        paper="Schulman 2017, eq. 7; Schulman 2016, eq. 16; Ziegler 2019, eq. 2",
        equation="A_c = whitened GAE; min(rho A, clip(rho) A)",
        target="E[r] - beta KL at the first update, up to the critic's bias (lambda < 1) and the whitening",
        differs="The ratio is to what was sampled from, temperature and filters included; the critic shares the trunk.",
        advantages=_GAE,
        loss=_PPO_CLIP,
        normalize="token",
        whiten_advantages=True,
        epochs=4,
        value_clip=0.2,
    ),
    "ppo_dual_clip": Estimator(
        paper="Ye 2020",
        equation="A_c = whitened GAE; max(min(rho A, clip(rho) A), 3 A) where A < 0",
        target="as ppo",
        differs="As ppo, with the loss of a bad token bounded where the policy has come to favour it.",
        advantages=_GAE,
        loss=partial(dual_clip_loss, clip_low=0.2, clip_high=0.2, dual_clip=3.0),
        normalize="token",
        whiten_advantages=True,
        epochs=4,
        value_clip=0.2,
    ),
    "raft": Estimator(
        paper="Dong 2023, algorithm 1",
        equation="A = G for the best of the group, 0 for the others",
        target="E[log policy] under the best of G (G - 1 of G completions are thrown away)",
        differs="Sampled anew for each update; the KL, optional in the paper, is in the reward that ranks.",
        advantages=best_of_group_advantages,
    ),
    "awr": Estimator(
        paper="Peng 2019, algorithm 1",
        equation="A = min(exp((r - group mean) / T), cap)",
        target="E[exp(A / T) log policy]",
        differs="The group's mean stands for the critic, and batches are fresh: no replay.",
        advantages=partial(exponential_advantages, reward_temperature=1.0, weight_cap=20.0),
    ),
    "importance_token": Estimator(
        paper="Espeholt 2018, eq. 1; Yao 2025",
        equation="A = r - mean of the others; min(rho_c, cap) A log pi",
        target=f"{_EXACT} on policy; off policy without the ratios of the tokens before, and of ratios above the cap",
        differs="RLOO's advantages; every token keeps a gradient, unlike with a clip.",
        advantages=leave_one_out_advantages,
        loss=partial(token_importance_loss, ratio_cap=2.0),
        minibatches=2,
    ),
    "importance_sequence": Estimator(
        paper="Ionides 2008; Metelli 2018",
        equation="A = r - mean of the others; min(product of rho, cap) A log pi",
        target=f"{_EXACT} on policy; off policy that of ratios up to the cap",
        differs="An infinite cap makes it unbiased for E[r] off policy; the KL is that of the policy that sampled.",
        advantages=leave_one_out_advantages,
        loss=partial(sequence_importance_loss, ratio_cap=2.0),
        minibatches=2,
    ),
}
"""Name -> algorithm, with its paper's settings where it has any."""


def make_estimator(name: str, **options: Any) -> Estimator:
    """A row of the table, with other values of its options.

    Args:
        name: of the row.
        options: fields of `Estimator`, or options of the row's functions.

    Raises:
        InputError: no such row, an option that would do nothing for it, or a value that cannot work.
    """
    if name not in ESTIMATORS:
        raise InputError(f"No estimator is named {name!r}; there are {', '.join(ESTIMATORS)}.")
    return with_options(name, ESTIMATORS[name], options)
