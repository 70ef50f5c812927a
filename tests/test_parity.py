"""The same policy here and in `transformers`: one writes, the other reads, and the logits agree.

Torch is optional; where RL_JAX_REQUIRE_PARITY is set, a missing torch fails.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.models.config import gpt2, llama
from rl_jax.models.huggingface import Policy, load_policy, save_policy
from rl_jax.models.lora import LoRA, init_adapters, merge_adapters, with_adapters
from rl_jax.models.peft import load_adapters, save_adapters
from rl_jax.models.reward_model import (
    RewardModel,
    init_reward_params,
    make_backbone,
    save_reward_model,
    sequence_rewards,
)
from rl_jax.models.rotary import RopeScaling
from rl_jax.models.transformer import hidden_states, init_params, logits
from rl_jax.preferences.losses import bradley_terry_loss
from rl_jax.rollout import generate
from rl_jax.sampling import Sampling
from rl_jax.slots import generate_in_slots

if "RL_JAX_REQUIRE_PARITY" in os.environ:
    import peft
    import torch
else:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

VOCAB = 260
LLAMA_SHAPE = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 80}
LLAMA_SHAPE |= {"vocab_size": VOCAB, "max_position_embeddings": 96}
GEMMA_SHAPE = LLAMA_SHAPE | {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = ROPE | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
THEIRS = {
    "gpt2": GPT2Config(vocab_size=VOCAB, n_positions=96, n_embd=48, n_layer=2, n_head=4, layer_norm_epsilon=1e-4),
    "gpt2 narrow": GPT2Config(vocab_size=VOCAB, n_positions=96, n_embd=48, n_layer=2, n_head=4, n_inner=32),
    "llama": LlamaConfig(**LLAMA_SHAPE, num_key_value_heads=2, rope_parameters=ROPE),
    "llama tied": LlamaConfig(**LLAMA_SHAPE, tie_word_embeddings=True, head_dim=8),
    "llama biased": LlamaConfig(**LLAMA_SHAPE, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3),
    "llama linear": LlamaConfig(**LLAMA_SHAPE, rope_parameters=ROPE | {"rope_type": "linear", "factor": 2.0}),
    "llama dynamic": LlamaConfig(**LLAMA_SHAPE, rope_parameters=ROPE | {"rope_type": "dynamic", "factor": 2.0}),
    "llama yarn": LlamaConfig(**LLAMA_SHAPE, rope_parameters=YARN),
    "llama yarn with mscale": LlamaConfig(
        **LLAMA_SHAPE, rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 8.0}
    ),
    "mistral": MistralConfig(**LLAMA_SHAPE, num_key_value_heads=2, sliding_window=6),
    "mistral without windows": MistralConfig(**LLAMA_SHAPE, num_key_value_heads=4, sliding_window=None),
    "qwen2 with windows": Qwen2Config(
        **LLAMA_SHAPE, num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3 biased": Qwen3Config(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, attention_bias=True),
    "gemma2": Gemma2Config(**GEMMA_SHAPE, query_pre_attn_scalar=24, attn_logit_softcapping=2.0),
    "gemma2 without caps": Gemma2Config(**GEMMA_SHAPE, final_logit_softcapping=None, attn_logit_softcapping=None),
    "gemma3_text": Gemma3TextConfig(
        **GEMMA_SHAPE,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
        query_pre_attn_scalar=8,
    ),
    "qwen2": Qwen2Config(**LLAMA_SHAPE, num_key_value_heads=1, rms_norm_eps=1e-3),
    "qwen3": Qwen3Config(**LLAMA_SHAPE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
}
GEMMA = {"norm": "rms_plus_one", "mlp": "geglu", "post_norms": True, "scaled_embedding": True, "head_size": 8}
OURS = {
    "gpt2": gpt2(VOCAB, 32, 2, 48, 4, mlp_width=64),
    "llama": llama(VOCAB, 32, 2, 48, 4, kv_heads=2, rope_theta=500.0, tied=False),
    "llama tied": llama(VOCAB, 32, 2, 48, 4, head_size=8),
    "qwen2": llama(VOCAB, 32, 2, 48, 4, kv_heads=1, qkv_bias=True, norm_epsilon=1e-3),
    "qwen3": llama(VOCAB, 32, 2, 48, 4, kv_heads=2, qk_norm=True, head_size=16, tied=False),
    "llama scaled": llama(VOCAB, 96, 2, 48, 4, rope_scaling=RopeScaling("llama3", 8.0, 64, 1.0, 4.0)),
    "qwen3 scaled": llama(VOCAB, 96, 2, 48, 4, qk_norm=True, rope_scaling=RopeScaling("yarn", 4.0, 24, 1.0, 32.0, 1.2)),
    "mistral": llama(VOCAB, 32, 2, 48, 4, kv_heads=2, windows=(6,)),
    "gemma2": llama(VOCAB, 32, 3, 48, 4, **GEMMA, windows=(5, 0), attention_cap=2.0, logit_cap=3.0, attention_size=24),
    "gemma3_text": llama(VOCAB, 32, 3, 48, 4, **GEMMA, windows=(5, 5, 0), qk_norm=True, window_theta=100.0),
}
TOKENS = np.random.default_rng(0).integers(VOCAB, size=(3, 20)).astype(np.int32)
MASK = np.arange(20) >= np.array([[0], [7], [15]])


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat, the cat sat"] * 2, VOCAB)


def our_logits(policy):
    states = hidden_states(policy.params, jnp.asarray(TOKENS), jnp.asarray(MASK), policy.config)
    return np.asarray(logits(policy.params, states, policy.config))[MASK]


def their_logits(model):
    mask = torch.tensor(MASK)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model.eval()(torch.tensor(TOKENS).long(), attention_mask=mask.long(), position_ids=positions)
    return output.logits.float().numpy()[MASK]


def their_greedy(model, length):
    """What greedy decoding without a cache adds to the prompts."""
    tokens, mask = torch.tensor(TOKENS).long(), torch.tensor(MASK)
    for _ in range(length):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            scores = model(tokens, attention_mask=mask.long(), position_ids=positions).logits[:, -1:]
        tokens, mask = torch.cat([tokens, scores.argmax(-1)], 1), torch.cat([mask, mask[:, -1:]], 1)
    return tokens[:, TOKENS.shape[1] :].numpy()


def assert_agree(policy, model):
    ours, theirs = our_logits(policy), their_logits(model)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.std(theirs) > 0.5


def filled(config):
    """Parameters none of which is left at 0 or 1."""
    rng = np.random.default_rng(1)

    def fill(path, x):
        return rng.normal(path[-1].key == "scale", 0.2, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(lambda: init_params(jax.random.key(0), config)))


def random_model(settings, dtype=torch.float32):
    """A model none of whose parameters is left at 0 or 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    model.set_attn_implementation("eager")  # the only one there that caps logits
    return model.to(dtype).eval()


@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS)
def test_theirs_read_here(settings, tokenizer, tmp_path):
    model = random_model(settings)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load_policy(tmp_path)
    assert_agree(policy, model)
    assert sum(x.size for x in jax.tree.leaves(policy.params)) == sum(x.numel() for x in model.parameters())
    save_policy(tmp_path / "again", policy)
    jax.tree.map(np.testing.assert_array_equal, load_policy(tmp_path / "again").params, policy.params)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", tmp_path))
    theirs = {name.removeprefix("transformer."): value for name, value in theirs.items()}
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])


@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS)
def test_greedy_completions_are_theirs(settings, tokenizer, tmp_path):
    model = random_model(settings)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy, sampling = load_policy(tmp_path), Sampling(length=64, temperature=0.0, ignore_eos=True)
    theirs = their_greedy(model, 64)
    for sample in (generate, generate_in_slots) if policy.config.windows else (generate_in_slots,):

        def complete(params, key, sample=sample):
            return sample(params, key, jnp.asarray(TOKENS), jnp.asarray(MASK), policy.config, sampling)

        ours = jax.jit(complete)(policy.params, jax.random.key(0)).completions
        np.testing.assert_array_equal(ours, theirs)
    assert len(np.unique(theirs)) > 3


@pytest.mark.parametrize("name", OURS)
def test_ours_read_there(name, tokenizer, tmp_path):
    policy = Policy(filled(OURS[name]), OURS[name], tokenizer)
    save_policy(tmp_path, policy)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert model.config.model_type == name.split()[0]
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert_agree(policy, model)


def test_bfloat16_weights_are_read(tokenizer, tmp_path):
    model = random_model(THEIRS["qwen3"], torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert_agree(load_policy(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))


def test_the_weights_of_the_model_without_its_head_are_read(tokenizer, tmp_path):
    model = random_model(THEIRS["gpt2"])
    model.transformer.save_pretrained(tmp_path)  # as the published GPT-2 was
    tokenizer.save_pretrained(tmp_path)
    assert_agree(load_policy(tmp_path), model)


@pytest.mark.parametrize("name", list(OURS))
def test_transformers_reads_our_reward_model(name, tokenizer, tmp_path):
    """As a classifier of one label; and its loss on a pair is Bradley-Terry's, as TRL has it."""
    backbone, config = make_backbone(init_params(jax.random.key(1), OURS[name]), OURS[name])
    member = init_reward_params(jax.random.key(2), backbone, config)
    save_reward_model(tmp_path, RewardModel(jax.tree.map(lambda x: x[None], member), config, tokenizer))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "member_0").eval()
    ours = np.asarray(sequence_rewards(member, jnp.asarray(TOKENS), jnp.asarray(MASK), config))
    with torch.no_grad():  # one at a time: without a padding token, transformers reads the last token
        theirs = [
            model(torch.tensor(row[mask][None]).long()).logits.item() for row, mask in zip(TOKENS, MASK, strict=True)
        ]
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
    loss = bradley_terry_loss(jnp.asarray(ours[None, :2]), jnp.array([[1.0, 0.0]]), jnp.array([0.2]))
    expected = -torch.nn.functional.logsigmoid(torch.tensor(theirs[0] - theirs[1] - 0.2))
    np.testing.assert_allclose(loss[0], expected.item(), rtol=1e-4)


ADAPTED = {"llama": ["q_proj", "v_proj", "down_proj"], "qwen3": ["o_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}


@pytest.mark.parametrize("targets", [("all",), ("value", "query", "down")])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_peft_reads_our_adapters(name, targets, tokenizer, tmp_path):
    base, settings = Policy(filled(OURS[name]), OURS[name], tokenizer), LoRA(3, alpha=4.5, targets=targets)
    rng = np.random.default_rng(2)
    adapters = init_adapters(jax.random.key(0), base.config, settings.rank, targets)
    adapters = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), adapters)
    save_policy(tmp_path / "base", base)
    save_adapters(tmp_path / "adapters", adapters, settings, base.config, str(tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = their_logits(model)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapters")
    assert_agree(base._replace(params=with_adapters(base.params, adapters, settings.scale)), model)
    assert np.max(np.abs(their_logits(model) - plain)) > 0.1


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", list(ADAPTED))
def test_adapters_of_peft_are_read(name, rslora, tokenizer, tmp_path):
    base = Policy(filled(OURS[name]), OURS[name], tokenizer)
    save_policy(tmp_path / "base", base)
    torch.manual_seed(0)
    patterns = {"alpha_pattern": {"mlp.c_proj": 3}, "rank_pattern": {"mlp.c_proj": 2}} if name == "gpt2" else {}
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=ADAPTED[name],
        use_rslora=rslora,
        init_lora_weights=False,
        fan_in_fan_out=name == "gpt2",
        **patterns,
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), settings)
    model.save_pretrained(tmp_path / "adapters")
    adapters = load_adapters(tmp_path / "adapters", base.config)
    assert_agree(base._replace(params=merge_adapters(base.params, adapters, 1.0)), model)
