"""The `config.json` of a model that need not be on this machine: what planning reads."""

import json
from pathlib import Path
from typing import Any

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.families import find_family
from megatron_rl.config.hub import cached_folder, fetch_config, is_hub_name
from megatron_rl.config.model_fit import read_hf_config

PUBLISHED = Path(__file__).with_name("published_models.json")
"""Name on the hub -> what is read of its `config.json`, for the models of the experiments in `configs`."""


def read_model_shape(config: Config) -> dict[str, Any]:
    """The model's `config.json`, by the names that families have in common.

    A folder is read. Of a name on the hub it is the file in the hub's cache, else the table of published models, else
    that one file is downloaded.

    Raises:
        ConfigError: when the model is neither a folder nor can be looked up.
    """
    path, family = config.model.path, config.model.family
    if config.model.scratch is not None and not (Path(path) / "config.json").exists():
        raise ConfigError(f"model.path={path!r} is yet to be made by `megatron-rl sft`; plan with it afterwards.")
    if is_hub_name(path) and cached_folder(path) is None:
        published: dict[str, dict[str, Any]] = json.loads(PUBLISHED.read_text())
        if path in published:
            return find_family(published[path], family, path).standard(published[path])
    fetch_config(path)
    return read_hf_config(path, family)
