"""Names on the Hugging Face hub: with the hub's real client, against caches on disk and a server on this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.config.hub import is_hub_name, split_name
from tests.hub import COMMIT, fill_cache, hub_environment, hub_server
from tests.launching import ROOT

PIN = """
import sys
from megatron_rl.config.errors import ConfigError
from megatron_rl.config.hub import local_folder, pin
try:
    pinned = pin(sys.argv[1])
    print(pinned, *sorted(file.name for file in local_folder(pinned).iterdir()))
except ConfigError as error:
    print(error)
assert "torch" not in sys.modules
"""


def pin(name: str, hf_home: Path, endpoint: str | None = None, folder: Path = ROOT) -> str:
    """What `pin` gives, or its error, in a process of its own; without an endpoint there is no network."""
    environment = hub_environment(hf_home, endpoint) | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PIN, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Files of a model, and what must not be downloaded."""
    folder = tmp_path / "files"
    folder.mkdir()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in (*index["weight_map"].values(), "chat_template.jinja", "pytorch_model.bin", "consolidated.safetensors"):
        (folder / name).write_text(name)
    return folder


READ = [
    "chat_template.jinja",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen3-8B", True),
        ("Qwen/Qwen2.5-7B@v1.0", True),
        (f"Qwen/Qwen3-8B@{COMMIT}", True),
        ("runs/arithmetic-sft/hf", False),
        ("/models/Qwen3-8B", False),
        ("./Qwen3-8B", False),
        ("Qwen3-8B", False),
        ("docs/plan.md", False),  # it exists
    ],
)
def test_a_name_has_one_slash_and_no_folder(text: str, name: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert is_hub_name(text) is name


def test_a_name_may_have_a_revision() -> None:
    assert split_name("Qwen/Qwen3-8B") == ("Qwen/Qwen3-8B", None)
    assert split_name("Qwen/Qwen3-8B@refs/pr/1") == ("Qwen/Qwen3-8B", "refs/pr/1")


def test_what_a_run_reads_is_downloaded_once_and_its_commit_named(model: Path, tmp_path: Path) -> None:
    with hub_server({"Org/Name": model}) as (endpoint, requests):
        expected = " ".join([f"Org/Name@{COMMIT}", *READ])
        assert pin("Org/Name", tmp_path / "home", endpoint) == expected
        assert not [request for request in requests if ".bin" in request or "consolidated" in request]
        requests.clear()
        assert pin("Org/Name@main", tmp_path / "home", endpoint) == expected
        assert not [request for request in requests if "resolve" in request]
        requests.clear()
        assert pin(f"Org/Name@{COMMIT}", tmp_path / "home", endpoint) == expected
        assert requests == []
    assert pin("Org/Name", tmp_path / "home") == expected, "without a network it is the cache's"


def test_a_cache_is_enough_without_a_network(model: Path, tmp_path: Path) -> None:
    fill_cache(tmp_path, "Org/Name", model)
    other = "f" * 40
    fill_cache(tmp_path, "Org/Name", model, other, branch="v2")
    for name, commit in (("Org/Name", COMMIT), ("Org/Name@main", COMMIT), ("Org/Name@v2", other)):
        assert pin(name, tmp_path).startswith(f"Org/Name@{commit} ")
    assert pin(f"Org/Name@{other}", tmp_path).startswith(f"Org/Name@{other} ")


def test_a_folder_of_that_name_wins(model: Path, tmp_path: Path) -> None:
    fill_cache(tmp_path, "Org/Name", model)
    (tmp_path / "Org" / "Name").mkdir(parents=True)
    assert pin("Org/Name", tmp_path, folder=tmp_path) == "Org/Name"


@pytest.mark.parametrize("missing", ["model-00002-of-00002.safetensors", "config.json"])
def test_a_cache_that_is_not_whole_is_one_sentence(model: Path, tmp_path: Path, missing: str) -> None:
    (fill_cache(tmp_path, "Org/Name", model) / missing).unlink()
    shown = pin("Org/Name", tmp_path)
    assert shown.startswith("model.path='Org/Name' is not a folder here, and ")
    assert f"{missing} is missing" in shown and "HF_HUB_OFFLINE" in shown and "\n" not in shown


def test_a_model_that_is_nowhere_names_both_readings_and_the_remedy(model: Path, tmp_path: Path) -> None:
    offline = pin("models/Qwen3-8B", tmp_path)
    assert offline.startswith(
        "model.path='models/Qwen3-8B' is not a folder here, and as a model on the Hugging Face hub"
    )
    assert "HF_HUB_OFFLINE" in offline and "hf download models/Qwen3-8B" in offline and "\n" not in offline
    with hub_server({"Org/Name": model}, gated=("Org/Gated",)) as (endpoint, _):
        assert "does not exist, or is private" in pin("Org/None", tmp_path, endpoint)
        assert "is gated: ask for access at" in pin("Org/Gated", tmp_path, endpoint)
        assert "has no revision 'v9'" in pin("Org/Name@v9", tmp_path, endpoint)
    unreachable = pin("Org/Name", tmp_path, endpoint)
    assert "cannot be looked up (ConnectError" in unreachable and "HF_HOME" in unreachable and "\n" not in unreachable
