"""Model files that were cut, spoilt or written to do harm: each loads whole, or is one error that names its folder.

The files are read in a process of their own, whose memory is limited to little more than it has before.
"""

import functools
import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save

from experiments.judgements import read_pairs, write_pairs
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.errors import InputError
from rl_jax.models.config import gpt2, llama
from rl_jax.models.huggingface import Policy, load_policy, save_policy
from rl_jax.models.reward_model import (
    RewardModel,
    init_reward_params,
    load_reward_model,
    make_backbone,
    save_reward_model,
)
from rl_jax.models.transformer import init_params
from rl_jax.run.report import write_report
from rl_jax.types import PreferenceBatch

ROOM = 192 << 20  # bytes that loading files of some kilobytes may add, threads and arenas included
SECONDS = 20.0  # for one of them, on a busy machine
CONFIGS = {"gpt2": gpt2(260, 16, 2, 8, 2), "llama": llama(260, 16, 2, 8, 2, mlp_width=8, tied=False)}
NUMBERS = ("null", "-1", "0", "1.5", "NaN", "Infinity", "1e308", "1" + "0" * 400, "2147483648", "1000000000000")
VALUES = (*NUMBERS, "2147483647", '"16"', '"\\ud800"', "[]", "{}", "true", "[[[[16]]]]")
WHOLE = (b"", b"\xff\xfe{}", b"[]", b"null", b"{}", b"[" * 100_000, b'{"a":' * 100_000, b"\x80\x04K\x01.")


def cuts_and_flips(content, rng, header, flips):
    """Files cut in many places, and with bytes changed in their first part and in all of it."""
    places = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(content) - 1}
    for place in sorted({place for place in places if place < len(content)} | set(rng.sample(range(len(content)), 8))):
        yield f"cut at {place}", content[:place]
    for number in range(flips):
        spoilt = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            spoilt[rng.randrange(len(content) if number % 4 == 0 else min(header, len(content)))] ^= rng.randrange(
                1, 256
            )
        yield f"flip {number}", bytes(spoilt)


def spoilt_weights(content, rng):
    """Mutants of a safetensors file: a label, the file, and whether it must be refused."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for lie in (0, 1, length - 1, length + 1, len(content), 2**31, 2**62, 2**64 - 1):
        yield f"header of {lie}", struct.pack("<Q", lie) + content[8:], True
    names = [name for name in header if name != "__metadata__"]
    first = names[0]
    begin, end = header[first]["data_offsets"]
    offsets = [
        [begin, end + len(content)],
        [begin - 4, end],
        [-4, end],
        [2**63, 2**63 + 4],
        [end, begin],
        [begin, 2**64],
    ]
    edits = [{"data_offsets": pair} for pair in [*offsets, header[names[1]]["data_offsets"], [], "x", None, [0.5, 1]]]
    edits += [
        {"dtype": kind} for kind in ("F64", "F16", "BF16", "I32", "U8", "BOOL", "C64", "F8_E4M3", "F4", "", 5, None)
    ]
    edits += [{"shape": shape} for shape in ([], [2**62, 4], [-1], [2**64], ["8"], "x", None, [1] * 100_000)]
    for edit in edits:
        yield f"{first} {edit}"[:80], packed(header | {first: header[first] | edit}, data), True
    for name in ("../../outside/weights", "/etc/passwd", "", "\x00", "a" * 1_000_000):
        yield (
            f"named {name[:40]!r}",
            packed({name if key == first else key: x for key, x in header.items()}, data),
            True,
        )
    for name in names:
        yield f"without {name}", packed({key: x for key, x in header.items() if key != name}, data), True
    twice = json.dumps(header)[:-1] + f', "{first}": {json.dumps(header[names[1]])}}}'
    yield "a name twice", struct.pack("<Q", len(twice)) + twice.encode() + data, True
    for whole in WHOLE:
        yield f"header {whole[:8]!r}", struct.pack("<Q", len(whole)) + whole + data, True
        yield f"file {whole[:8]!r}", whole, True
    for kind in ("nan", "inf"):
        number = np.float32(kind).tobytes()
        yield kind, content[:-4] + number, True
    yield from ((*mutant, False) for mutant in cuts_and_flips(content, rng, 8 + length, 80))


def packed(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def spoilt_settings(content, rng):
    """Mutants of a config.json."""
    settings = json.loads(content)
    texts = {name: json.dumps(value) for name, value in settings.items()}
    for name in settings:
        without = {key: text for key, text in texts.items() if key != name}
        yield f"without {name}", joined(without), False
        for value in VALUES:
            yield f"{name}: {value[:20]}", joined(without | {name: value}), False
    for name in ("num_hidden_layers", "n_layer", "vocab_size", "hidden_size", "n_embd", "n_head", "head_dim"):
        if name in settings:
            for value in ("2147483647", "1000000000000", "NaN", "true", '"2"', "2.0"):
                yield f"must: {name}: {value}", joined(texts | {name: value}), True
    yield from ((f"file {whole[:8]!r}", whole, True) for whole in WHOLE)
    yield from ((*mutant, False) for mutant in cuts_and_flips(content, rng, len(content), 40))


def joined(texts):
    return ("{" + ",".join(f'"{name}": {text}' for name, text in texts.items()) + "}").encode()


def spoilt_tokenizer(content, rng):
    """Mutants of a tokenizer.json."""
    whole = json.loads(content)
    model = whole["model"]
    values = (None, -1, 5, "x", [], {}, [[]], [1], {"type": "x"}, {"a": 10**12})
    for name in whole:
        yield from ((f"{name}: {value}", json.dumps(whole | {name: value}).encode(), False) for value in values)
    for name in model:
        for value in values:
            yield f"model {name}: {value}", json.dumps(whole | {"model": model | {name: value}}).encode(), False
    vocab = model["vocab"]
    merges = [["a", "b"], ["ab", "a"], ["b", "aba"], ["a", "baba"]]
    for label, change in {
        "huge id": {"vocab": vocab | {"a": 2**32 - 1}},
        "id beyond the model's": {"vocab": vocab | {"a": 260}},
        "id no integer": {"vocab": vocab | {"a": 1.5}},
        "merges of what is not there": {"merges": [["never", "there"]]},
        "merges in a circle": {"merges": merges},
        "merges of one": {"merges": [["a"]]},
        "merges of text": {"merges": ["a"]},
    }.items():
        yield label, json.dumps(whole | {"model": model | change}).encode(), True
    for token in ({"id": 0}, {"id": -1, "content": "x"}, {"id": 2**40, "content": "x"}, "x", None, {"id": "0"}):
        yield f"added {token}", json.dumps(whole | {"added_tokens": [token]}).encode(), True
    yield from ((f"file {spoilt[:8]!r}", spoilt, True) for spoilt in WHOLE)
    yield from ((*mutant, False) for mutant in cuts_and_flips(content, rng, len(content), 60))


def spoilt_tokenizer_settings(content, rng):
    """Mutants of a tokenizer_config.json; `outside` has a tokenizer that must not be read."""
    settings = json.loads(content)
    outside = "../outside/tokenizer.4.0.0.json"
    for name in (*settings, "bos_token", "added_tokens_decoder", "extra_special_tokens", "chat_template", "auto_map"):
        for value in (None, 5, [], {}, [5], {"content": 5}, "x" * 100, {"0": {"content": 5}}):
            yield f"{name}: {value}", json.dumps(settings | {name: value}).encode(), False
    for name in ("fast_tokenizer_files", "tokenizer_file", "vocab_file", "merges_file", "init_inputs"):
        for value in ([outside], [str(Path("/etc/passwd"))], outside):
            yield f"{name}: {value}", json.dumps(settings | {name: value}).encode(), True
    for value in ("PhonyTokenizer", "../outside", "os.system"):
        yield f"class {value}", json.dumps(settings | {"tokenizer_class": value}).encode(), False
    yield from ((f"file {spoilt[:8]!r}", spoilt, spoilt != b"{}") for spoilt in WHOLE[:-1])
    yield from ((*mutant, False) for mutant in cuts_and_flips(content, rng, len(content), 10))


def spoilt_normalizer(content, rng):
    """Mutants of a reward.json."""
    for mean in (*VALUES, "[null]", '"0"', "[NaN]", "[1e39]", "[[0.0]]", "[0.0, 0.0]", "{}"):
        yield f"mean {mean[:20]}", f'{{"mean": {mean}, "std": [1.0]}}'.encode(), True
    for std in (*VALUES, "[0.0]", "[-1.0]", "[Infinity]", "[1.0, 1.0]"):
        yield f"std {std[:20]}", f'{{"mean": [0.0], "std": {std}}}'.encode(), True
    yield "members that are not there", json.dumps({"mean": [0.0] * 9999, "std": [1.0] * 9999}).encode(), True
    yield from ((f"file {spoilt[:8]!r}", spoilt, True) for spoilt in WHOLE)


def write_models(place):
    """A policy of each family and a reward model, and a tokenizer and weights outside of all of them."""
    tokenizer = train_tokenizer(["the cat sat on the mat, the cat sat"] * 2, 260)
    for name, config in CONFIGS.items():
        save_policy(place / name, Policy(init_params(jax.random.key(0), config), config, tokenizer))
    backbone, config = make_backbone(init_params(jax.random.key(0), CONFIGS["llama"]), CONFIGS["llama"])
    member = init_reward_params(jax.random.key(1), backbone, config)
    save_reward_model(place / "reward", RewardModel(jax.tree.map(lambda x: x[None], member), config, tokenizer))
    (place / "outside").mkdir()
    (place / "outside" / "weights").write_bytes((place / "gpt2" / "model.safetensors").read_bytes())
    (place / "outside" / "tokenizer.4.0.0.json").write_bytes((place / "gpt2" / "tokenizer.json").read_bytes())


WAYS = (
    ("gpt2", "model.safetensors", spoilt_weights),
    ("llama", "model.safetensors", spoilt_weights),
    ("gpt2", "config.json", spoilt_settings),
    ("llama", "config.json", spoilt_settings),
    ("gpt2", "tokenizer.json", spoilt_tokenizer),
    ("llama", "tokenizer_config.json", spoilt_tokenizer_settings),
    ("reward", "reward.json", spoilt_normalizer),
    ("reward", "member_0/model.safetensors", spoilt_weights),
)


@functools.cache
def shapes(config):
    return jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda: init_params(jax.random.key(0), config)))


def assert_whole(model):
    """What was loaded can be used: finite parameters of the shapes that its configuration asks for, and a tokenizer."""
    member = {name: x for name, x in model.params.items() if name not in ("reward_head", "normalizer")}
    if isinstance(model, RewardModel):
        member = jax.tree.map(lambda x: x[0], member)
    assert jax.tree.map(lambda x: x.shape, member) == shapes(model.config)
    assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in map(np.asarray, jax.tree.leaves(model.params)))
    ids = model.tokenizer("the cat\n\N{CAT FACE}")["input_ids"]
    assert all(0 <= id < model.config.vocab_size for id in [*ids, model.tokenizer.eos_token_id])


def look_at(name, file, spoil, place):
    """Loads every mutant of a file; what is wrong, and how many were loaded and how many refused."""
    folder, load = place / name, load_reward_model if name == "reward" else load_policy
    content, wrong, loaded, refused = (folder / file).read_bytes(), [], 0, 0
    assert_whole(load(folder))
    for label, spoilt, must in spoil(content, random.Random(f"{name} {file}")):
        (folder / file).write_bytes(spoilt)
        begun = time.monotonic()
        try:
            assert_whole(load(folder))
            loaded += 1
            wrong += [f"{label}: was loaded"] if must else []
        except InputError as error:
            refused += 1
            text = str(error)
            if str(folder) not in text or "\n" in text or len(text) > 1000 or text.isspace():
                wrong.append(f"{label}: {text[:200]}")
        except BaseException as error:
            wrong.append(f"{label}: {type(error).__name__}: {str(error)[:200]}")
        if time.monotonic() - begun > SECONDS:
            wrong.append(f"{label}: took {time.monotonic() - begun:.0f} s")
    (folder / file).write_bytes(content)
    return wrong, loaded, refused


def main(place):
    """Looks at every way, with little more memory than the process has, and with an eye on what is opened."""
    write_models(place)
    for name in ("gpt2", "llama", "reward"):
        assert_whole((load_reward_model if name == "reward" else load_policy)(place / name))
    opened = set()
    sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
    found = {f"{name}/{file}": look_at(name, file, spoil, place) for name, file, spoil in WAYS}
    outside = sorted(path for path in opened if "outside" in path or path.startswith("/etc/passwd"))
    print(json.dumps({"found": found, "outside": outside}))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the memory of a process is limited as Linux does it")
def test_every_spoilt_file_loads_whole_or_is_one_clear_error(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "RUST_BACKTRACE": "0", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, str(Path(__file__).resolve()), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert not report["outside"]
    for way, (wrong, loaded, refused) in report["found"].items():
        assert not wrong, f"{way}: " + "\n".join(wrong)
        assert refused > 20, f"{way}: {loaded} loaded, {refused} refused"
    assert sum(loaded for _, loaded, _ in report["found"].values()) > 100


def test_an_index_is_not_followed_elsewhere(tmp_path):
    write_models(tmp_path)
    folder = tmp_path / "gpt2"
    index = {"weight_map": dict.fromkeys(("wte.weight", "wpe.weight"), "../outside/weights")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_whole(load_policy(folder))
    (folder / "model.safetensors").unlink()
    for name in ("../outside/weights", "../outside/model.safetensors", "/etc/passwd", 5, None):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
        with pytest.raises(InputError, match=r"gpt2/model\.safetensors\.index\.json"):
            load_policy(folder)


def test_members_of_an_ensemble_are_alike(tmp_path):
    write_models(tmp_path)
    folder = tmp_path / "reward"
    (folder / "reward.json").write_text('{"mean": [0.0, 0.0], "std": [1.0, 1.0]}')
    (folder / "member_1").mkdir()
    settings = json.loads((folder / "member_0" / "config.json").read_text())
    (folder / "member_1" / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.5}))
    (folder / "member_1" / "model.safetensors").write_bytes((folder / "member_0" / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"member_1 has another config\.json"):
        load_reward_model(folder)
    (folder / "member_1" / "model.safetensors").write_bytes(save({"score.weight": np.ones((1, 9), np.float32)}))
    with pytest.raises(InputError, match=r"member_1.*no reward head of 8 numbers"):
        load_reward_model(folder)


VALUES_OF_A_RUN = (
    *VALUES,
    '"2"',
    "[5]",
    '[["x"], {}]',
    '{"x": []}',
    '{"x": {"y": 1}}',
    "[" * 5_000 + "]" * 5_000,
    "[" * 60 + "]" * 60,
)
SUMMARY = {
    "reward": "length", "reward_before": 0.5, "reward_after": 1.5, "reward_before_interval": [0.25, 0.75],
    "reward_after_interval": [1.25, 1.75], "gold_before": 0.5, "gold_after": 0.25, "kl": 3.0, "win_rate": 0.5,
    "length_before": 8.0, "held_out_loss": 3.0, "held_out_perplexity": 20.0, "parameters": 5000, "seconds": 9.0,
    "seconds_by_stage": {"rl": 9.0}, "seed": 0,
    "reward_model": {"kind": "pairs", "pair_accuracy": 0.75, "reliability": [], "members": 1},
}  # fmt: skip
SETTINGS = {
    "script": "x.py", "device": "cpu", "config": {"seed": 0}, "estimator": {"name": "rloo"}, "versions": {"jax": "0"},
}  # fmt: skip
SIDE = {"tokens": ["a"], "log_ratio": [0.5], "reward": 1.0, "advantage": 0.5}
PAIRS = {"pairs": [{"prompt": "x", "before": SIDE, "after": SIDE}]}
ROW = {"stage": "rl", "step": 0, "reward": 0.5, "tokens_per_second": 10.0}


def spoilt_objects(value):
    """Texts of a JSON object with one of its values, at any depth, replaced or left out."""
    for name, inner in value.items():
        rest = {key: json.dumps(other) for key, other in value.items() if key != name}
        yield joined(rest)
        yield from (joined(rest | {name: text}) for text in VALUES_OF_A_RUN)
        inner, wrap = (inner[0], "[%s]") if isinstance(inner, list) and inner else (inner, "%s")
        if isinstance(inner, dict):
            yield from (joined(rest | {name: wrap % text.decode()}) for text in spoilt_objects(inner))


def test_a_report_of_spoilt_files_is_written_or_refused_by_name(tmp_path):
    whole = {"config.json": SETTINGS, "summary.json": SUMMARY, "completions.json": PAIRS, "metrics.jsonl": ROW}
    found = {name: [0, 0] for name in whole}
    for name, value in whole.items():
        for other, kept in whole.items():
            (tmp_path / other).write_text("" if other == "metrics.jsonl" != name else json.dumps(kept))
        for text in {*spoilt_objects(value), *WHOLE}:
            (tmp_path / name).write_bytes(text)
            try:
                write_report(tmp_path)
            except InputError as error:
                message = str(error)
                assert message.startswith(str(tmp_path)) and len(message) < 400 and "\n" not in message, text[:80]
                found[name][1] += 1
            else:
                found[name][0] += 1
    assert all(written > 5 for written, _ in found.values()), found
    assert all(refused > 10 for name, (_, refused) in found.items() if name != "metrics.jsonl"), found


def test_spoilt_pairs_are_read_whole_or_refused_by_name(tmp_path):
    path, rng = tmp_path / "preferences_1.safetensors", random.Random(0)
    tokens, mask = np.arange(6, dtype=np.int32).reshape(3, 2), np.ones((3, 2), bool)
    pairs = PreferenceBatch(
        prompts=tokens,
        prompt_mask=mask,
        completions=np.stack([tokens, tokens], axis=1),
        completion_mask=np.stack([mask, mask], axis=1),
        labels=np.array([[1, 0], [0, 1], [0.5, 0.5]], np.float32),
        margins=np.zeros(3, np.float32),
    )
    write_pairs(path, pairs, np.array([0.5, 1.0, 0.0], np.float32), train_tokenizer(["abab abab"], 260))
    content, refused = path.read_bytes(), 0
    for label, text, must in spoilt_weights(content, rng):
        path.write_bytes(text)
        try:
            read, gaps = read_pairs(path)
        except InputError as error:
            assert str(error).startswith(f"{path} cannot be read (") and "\n" not in str(error), label
            refused += 1
        else:
            assert not must or label in ("nan", "inf"), label  # which are masks here
            assert jax.tree.map(np.shape, read) == jax.tree.map(np.shape, pairs) and gaps.shape == (3,), label
    assert refused > 50
    path.unlink()
    with pytest.raises(InputError, match=r"preferences_1\.safetensors cannot be read .*bring it back"):
        read_pairs(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))


def test_brackets_in_each_other_are_counted(tmp_path):
    for levels in (49, 50):  # and those of the object itself
        (tmp_path / "config.json").write_text('{"device": ' + "[" * levels + "]" * levels + "}")
        if levels == 49:
            write_report(tmp_path)
    with pytest.raises(InputError, match=r"config\.json has more than 50 brackets in each other"):
        write_report(tmp_path)
