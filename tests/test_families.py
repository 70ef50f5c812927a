"""Every family's config.json is read, written and read again; and what no Transformer here does is refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rl_jax.errors import InputError
from rl_jax.models.attention import attend
from rl_jax.models.config import gpt2, llama
from rl_jax.models.families import FAMILIES, family, from_settings, to_settings
from rl_jax.models.rotary import RopeScaling, frequencies
from rl_jax.models.transformer import hidden_states, init_params
from rl_jax.packing import Packing
from rl_jax.rollout import generate
from rl_jax.sampling import Sampling
from rl_jax.scoring import completion_logprobs, score_completions
from rl_jax.slots import generate_in_slots

VOCAB = 40
SHAPE = (VOCAB, 32, 3, 16, 4)
GEMMA = {"norm": "rms_plus_one", "mlp": "geglu", "post_norms": True, "scaled_embedding": True, "kv_heads": 2}
LLAMA3 = RopeScaling("llama3", 8.0, 16, 1.0, 4.0)
CONFIGS = {
    "gpt2": gpt2(*SHAPE, mlp_width=24),
    "llama": llama(*SHAPE, qkv_bias=True, out_bias=True, mlp_bias=True, tied=False, rope_scaling=LLAMA3),
    "mistral": llama(*SHAPE, kv_heads=2, windows=(4,)),
    "qwen2": llama(*SHAPE, qkv_bias=True, windows=(0, 4, 4), rope_scaling=RopeScaling("linear", 2.0)),
    "qwen3": llama(*SHAPE, qk_norm=True, rope_scaling=RopeScaling("yarn", 4.0, 8, 1.0, 32.0, 1.25, False)),
    "gemma2": llama(*SHAPE, **GEMMA, windows=(4, 0), attention_cap=2.0, logit_cap=3.0, attention_size=6),
    "gemma3_text": llama(*SHAPE, **GEMMA, windows=(4, 4, 0), qk_norm=True, window_theta=100.0),
}
every_family = pytest.mark.parametrize("name", CONFIGS)


def random_params(config, seed=0):
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), jnp.float32), shapes)


def test_there_is_an_example_of_every_family():
    assert CONFIGS.keys() == FAMILIES.keys()


@every_family
def test_settings_survive_the_way_out_and_in(name):
    config = CONFIGS[name]
    assert family(dataclasses.replace(config, dtype="bfloat16", remat=True)) == name
    settings = to_settings(config, [3, 7])
    assert (settings["model_type"], settings["eos_token_id"], settings["bos_token_id"]) == (name, [3, 7], 3)
    assert from_settings(settings) == config
    assert to_settings(config, 3)["eos_token_id"] == 3


@pytest.mark.parametrize(
    "name", [name if config.windows else pytest.param(name, marks=pytest.mark.slow) for name, config in CONFIGS.items()]
)
def test_decoding_with_either_cache_agrees_with_reading_the_whole(name):
    """Windows, caps and scaled embeddings mean the same in a cache, a ring, packed rows and a padded batch."""
    config, sampling = CONFIGS[name], Sampling(length=12, group_size=2)
    params = random_params(config)
    prompts = jnp.arange(18).reshape(3, 6)
    mask = jnp.arange(6)[None, :] >= jnp.array([[0], [2], [5]])
    key = jax.random.key(1)
    ring = jax.jit(lambda p: generate_in_slots(p, key, prompts, mask, config, sampling, slots=4))(params)
    plain = jax.jit(lambda p: generate(p, key, prompts, mask, config, sampling))(params)
    np.testing.assert_array_equal(ring.completions, plain.completions)
    expected = completion_logprobs(params, ring, config, sampling)
    np.testing.assert_allclose(ring.behavior_logprobs, expected, atol=2e-5)
    np.testing.assert_allclose(plain.behavior_logprobs, expected, atol=2e-5)
    packed = jax.jit(lambda p: score_completions(p, ring, config, sampling, packing=Packing(4, 40)))(params)
    np.testing.assert_allclose(packed.logprobs, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3_text"])
def test_a_window_hides_what_lies_before_it(name):
    """The last state changes with a token's embedding exactly if some path of windows leads to it."""
    config = dataclasses.replace(CONFIGS[name], windows=(4,))
    params = random_params(config)
    mask = jnp.ones((1, 20), bool)
    one, other = jnp.arange(20)[None], jnp.arange(20)[None].at[0, 9].set(33)
    states = [hidden_states(params, tokens, mask, config)[0] for tokens in (one, other)]
    changed = np.abs(states[0] - states[1]).max(axis=1) > 1e-7
    reach = 9 + 3 * (4 - 1)  # each of 3 layers carries it 3 tokens on
    np.testing.assert_array_equal(changed, (np.arange(20) >= 9) & (np.arange(20) <= reach))


def test_the_gradient_of_capped_attention_is_the_automatic_one():
    rng = np.random.default_rng(0)
    query, keys, values = (jnp.asarray(rng.normal(0, 2, shape)) for shape in ((2, 5, 4, 6), (2, 2, 7, 6), (2, 2, 7, 6)))
    mask = jnp.asarray(rng.random((2, 5, 7)) < 0.7).at[:, :, 0].set(True)
    weight = jnp.asarray(rng.normal(size=(2, 5, 4, 6)))

    def plain(query, keys, values):
        scores = jnp.einsum("bsjgk,bjtk->bjgst", query.reshape(2, 5, 2, 2, 6), keys) * 6**-0.5
        scores = jnp.where(mask[:, None, None], 1.5 * jnp.tanh(scores / 1.5), -jnp.inf)
        return jnp.einsum("bjgst,bjtk->bsjgk", jax.nn.softmax(scores), values).reshape(2, 5, 4, 6)

    ours = jax.value_and_grad(lambda *x: jnp.sum(weight * attend(*x, mask, 1.5)), (0, 1, 2))(query, keys, values)
    theirs = jax.value_and_grad(lambda *x: jnp.sum(weight * plain(*x)), (0, 1, 2))(query, keys, values)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


def test_frequencies_by_hand():
    plain = np.array([1.0, 0.1, 0.01, 0.001])
    np.testing.assert_allclose(frequencies(10_000.0, 8), plain, rtol=1e-6)
    np.testing.assert_allclose(frequencies(10_000.0, 8, RopeScaling("dynamic", 4.0)), plain, rtol=1e-6)
    np.testing.assert_allclose(frequencies(10_000.0, 8, RopeScaling("linear", 4.0)), plain / 4, rtol=1e-6)
    # Turns in 1,000 tokens: 159, 15.9, 1.59, 0.159; fast above 4, slow below 1, 0.197 of the way between.
    found = frequencies(10_000.0, 8, RopeScaling("llama3", 4.0, 1000, 1.0, 4.0))
    share = (10 / (2 * np.pi) - 1) / 3
    np.testing.assert_allclose(found, [1.0, 0.1, 0.01 * (share + (1 - share) / 4), 0.001 / 4], rtol=1e-5)


BASE = to_settings(llama(50, 64, 2, 16, 4), 0)
GEMMA2 = to_settings(CONFIGS["gemma2"], 0)
REFUSED = {
    "model_type": (BASE | {"model_type": "phi3"}, "type 'phi3' are not supported; gpt2, llama, mistral"),
    "quantized": (BASE | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config = "),
    "longrope": (BASE | {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type = 'longrope'"),
    "factor": (BASE | {"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
    "order": (
        BASE
        | {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        "high_freq_factor = 1.0",
    ),
    "partial": (BASE | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    "nested": (BASE | {"rope_parameters": {"full_attention": {}}}, "for gemma3_text alone"),
    "types": (GEMMA2 | {"layer_types": ["full_attention"]}, "layer_types = "),
    "kind": (GEMMA2 | {"layer_types": ["chunked_attention"] * 3}, "type 'chunked_attention'"),
    "window": (GEMMA2 | {"sliding_window": 0}, "sliding_window = 0"),
    "scalar": (GEMMA2 | {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar = -1"),
    "cap": (GEMMA2 | {"final_logit_softcapping": -3.0}, "final_logit_softcapping = -3.0"),
    "activation": (GEMMA2 | {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
    "bidirectional": (GEMMA2 | {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_named(case):
    settings, named = REFUSED[case]
    with pytest.raises(InputError, match=named):
        from_settings(settings)


def test_older_files_are_read():
    """As Gemma 3 and Llama 3.1 were published, before rope_parameters and layer_types."""
    old = {name: value for name, value in to_settings(CONFIGS["gemma3_text"], 0).items() if name != "layer_types"}
    del old["rope_parameters"]
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = from_settings(old | {"sliding_window_pattern": 2})
    assert (config.rope_theta, config.window_theta, config.windows) == (1e6, 1e4, (4, 0))
    assert config.rope_scaling == RopeScaling("linear", 8.0)
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 16}
    old = {name: value for name, value in BASE.items() if name != "rope_parameters"}
    config = from_settings(old | {"rope_theta": 5e5, "rope_scaling": scaling})
    assert (config.rope_theta, config.rope_scaling) == (5e5, LLAMA3)
