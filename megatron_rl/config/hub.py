"""Models by their names on the Hugging Face hub: `Org/Name`, or `Org/Name@revision`. Importable without torch.

`pin_model` comes first, in every process that a user or a cluster starts: it brings the files that a run reads into the
hub's cache (`HF_HOME`; `HF_HUB_OFFLINE=1`: they have to be there already) and names the exact commit. Everything
that reads a model afterwards asks `local_folder`, which needs no network. So each node has its own copy in its own
cache, and the experiment says the same on all of them.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.config.errors import ConfigError

if TYPE_CHECKING:
    from megatron_rl.config.schema import Config

FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja")
"""What is read of a model: configurations, weights, tokenizer, chat template."""
LEFT_OUT = ("*/*", "consolidated*")
"""Other copies of the same weights."""
NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
MODEL_PATH = "model.path="
"""How messages name the setting, unless they are told otherwise."""


def is_hub_name(path: str) -> bool:
    """Whether `path` can only be meant as a model on the hub: it has the form, and there is no such folder."""
    return NAME.fullmatch(path) is not None and not Path(path).exists()


def split_name(name: str) -> tuple[str, str | None]:
    """(repository, revision or None) of a name."""
    repo, _, revision = name.partition("@")
    return repo, revision or None


def pin_model(config: "Config") -> "Config":
    """The experiment with the files of its model on this machine, and their commit in `model.path`.

    A folder stays as it is.

    Raises:
        ConfigError: as `pin`.
    """
    if config.model.scratch is not None:  # the folder is yet to be made
        return config
    model = config.model.model_copy(update={"path": pin(config.model.path)})
    return config.model_copy(update={"model": model})


def pin(path: str, setting: str = MODEL_PATH) -> str:
    """`Org/Name@commit` for a model on the hub, whose files are on this machine from then on; another path as it is.

    Processes that do this at the same time share the work: the hub's client locks each file.

    Args:
        path: a folder or a name.
        setting: how messages name it.

    Raises:
        ConfigError: when the model is neither a folder nor can be had from the hub, or is not whole.
    """
    if not is_hub_name(path):
        return path
    repo, revision = split_name(path)
    folder = cached_folder(path) if COMMIT.fullmatch(revision or "") else None
    if folder is None or _missing_file(folder) is not None:
        folder = _download(path, setting, FILES)
    if (missing := _missing_file(folder)) is not None:
        raise ConfigError(
            f"{setting}{path!r} is not a folder here, and of that model on the Hugging Face hub {missing} is missing "
            f"in {folder}; download the rest with a network and without HF_HUB_OFFLINE, or choose a model that has it."
        )
    return f"{repo}@{folder.name}"


def local_folder(path: str | Path) -> Path:
    """The folder of a model: `path` itself, or where the hub's cache has the model of that name.

    Raises:
        ConfigError: when the cache does not have it.
    """
    if not is_hub_name(str(path)):
        return Path(path)
    folder = cached_folder(str(path))
    if folder is None:
        raise ConfigError(
            f"{MODEL_PATH}{str(path)!r} is not a folder, and no model of that name is in the Hugging Face hub's cache "
            f"on this machine; download it with `hf download {split_name(str(path))[0]}`, or give a folder."
        )
    return folder


def fetch_config(path: str) -> Path:
    """Only the configuration of a model, downloaded unless it is there: the folder with it.

    Raises:
        ConfigError: as `pin`.
    """
    if not is_hub_name(path):
        return Path(path)
    folder = cached_folder(path)
    if folder is None or not (folder / "config.json").exists():
        folder = _download(path, MODEL_PATH, ("config.json",))
    return folder


def cached_folder(name: str) -> Path | None:
    """Where the hub's cache has that model, whole or in part; None: it has nothing of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, revision = split_name(name)
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=["config.json"]))
    except LocalEntryNotFoundError:
        return None


def _download(path: str, setting: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if os.environ.get("LOCAL_RANK", "0") != "0":
        disable_progress_bars()
    repo, revision = split_name(path)
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(files), ignore_patterns=list(LEFT_OUT))
        )
    except Exception as error:  # whatever the client and its transport raise
        raise ConfigError(
            f"{setting}{path!r} is not a folder here, and as a model on the Hugging Face hub it {_reason(error, path)}."
        ) from error


def _reason(error: Exception, path: str) -> str:
    """What is wrong with a name, and what to do: the end of a sentence."""
    from huggingface_hub import constants, errors

    repo, revision = split_name(path)
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: ask for access at {constants.ENDPOINT}/{repo}, then run `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "does not exist, or is private: correct the name, or run `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision!r}: name a branch, a tag or a commit of it behind the @"
    if constants.HF_HUB_OFFLINE:
        return (
            f"is not, or not whole, in the cache {constants.HF_HUB_CACHE}, while HF_HUB_OFFLINE allows no download: "
            f"run `hf download {repo}` where there is a network, or unset it"
        )
    cause = error.__cause__ or error
    reason = " ".join(f"{type(cause).__name__}: {cause}".split())
    return (
        f"cannot be looked up ({reason}): try again with a network, or run `hf download {repo}` where there is one and "
        "let HF_HOME name that cache"
    )


def _missing_file(folder: Path) -> str | None:
    """What a model's folder lacks; None: it is whole."""
    if not (folder / "config.json").exists():
        return "config.json"
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return next((name for name in shards if not (folder / name).exists()), None)
    return None if any(file.exists() for file in folder.glob("*.safetensors")) else "*.safetensors"
