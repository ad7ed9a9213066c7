"""From YAML files with `base:` inheritance and `a.b=c` overrides to one validated `Config`."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ValidationError

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.schema import Config


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment file.

    Args:
        file: YAML file; its `base:` key names the file it inherits from, relative to itself.
        overrides: `key.path=value` texts, the value in YAML.

    Raises:
        ConfigError: one sentence that names the file or key, the value and the remedy.
    """
    content, changes = _read(Path(file), []), _parse_overrides(overrides)
    try:
        values = OmegaConf.to_container(OmegaConf.merge(content, changes), resolve=True)
    except Exception as error:  # of interpolations, and of what YAML can write and a config cannot hold
        message = str(error).strip() or type(error).__name__
        raise ConfigError(f"{file}: {message.splitlines()[0].rstrip('.')}.") from None
    _check_types(values, "", file)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{file}: {describe(error)}") from None


def _check_types(value: Any, key: str, file: str | Path) -> None:
    """Only what YAML writes as it reads it: `run_dir/config.yaml` has to be the same experiment."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ConfigError(f"{file}: {key or 'the top level'} has the key {name!r}, which is no text; quote it.")
            _check_types(item, f"{key}.{name}".lstrip("."), file)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            _check_types(item, f"{key}[{place}]", file)
    elif value is not None and not isinstance(value, str | int | float):
        raise ConfigError(f"{file}: {key} holds a value of type {type(value).__name__}; write a text or a number.")


def save_config(config: Config, file: Path) -> None:
    """Write the resolved config as YAML, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".tmp")
    draft.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    draft.replace(file)


def _read(file: Path, chain: list[Path]) -> DictConfig:
    try:
        resolved = file.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, a link to itself
        raise ConfigError(f"{file} cannot be read ({error}).") from None
    if resolved in chain:
        raise ConfigError(f"{file}: `base:` leads back to itself; remove the loop.")
    try:
        content = OmegaConf.load(file)
    except FileNotFoundError:
        origin = f" (the base of {chain[-1]})" if chain else ""
        raise ConfigError(f"{file}{origin} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}).") from None
    except Exception as error:  # YAML's constructors pass on what dates, numbers and depths raise
        raise ConfigError(f"{file} is not valid YAML: {_in_words(error)}.") from None
    if not isinstance(content, DictConfig):
        raise ConfigError(f"{file} must hold `key: value` pairs.")
    try:
        base = content.pop("base", None)
    except Exception as error:  # an interpolation
        raise ConfigError(f"{file}: `base:` must be the name of a file: {_in_words(error)}.") from None
    if base is None:
        return content
    return OmegaConf.merge(_read(file.parent / str(base), [*chain, resolved]), content)  # type: ignore[return-value]


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for text in overrides:
        if not re.match(r"[^=.\s]+(\.[^=.\s]+)*=", text):
            raise ConfigError(f"override {text!r} must have the form key.path=value.")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:  # as in _read
        raise ConfigError(f"overrides {' '.join(overrides)}: {_in_words(error)}.") from None


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic error as one sentence, with a suggestion for a mistyped key."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}{suggestion(path)}."
    if first["type"] == "missing":
        return f"the key {key} is required."
    if first["type"] == "model_type":
        return f"{key}={first['input']!r} is not valid: {key} is a section with keys of its own."
    if isinstance(first.get("ctx", {}).get("error"), ConfigError):
        return str(first["ctx"]["error"])
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    message = first["msg"].rstrip(".")
    return f"{key}={first['input']!r} is not valid: {message[0].lower() + message[1:]}{more}."


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys of the schema, sections included."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        section = section_type(field.annotation)
        if section is not None:
            keys += all_keys(section, prefix + name + ".")
    return keys


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section class inside `annotation` (also of `Section | None`), or None for a plain value."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


RENAMED = {
    "rollout.verify": "rollout.sampler",
    "rollout.partial_share": "rollout.partial_fraction",
    "train.minibatches": "train.num_minibatches",
    "data.arithmetic.direct_share": "data.arithmetic.direct_fraction",
}
"""Keys that had other names."""


def suggestion(path: list[str]) -> str:
    """What to say after the name of a key that does not exist: its new name, the nearest key, or the keys there are."""
    if (key := ".".join(path)) in RENAMED:
        return f"; it is called {RENAMED[key]} now"
    keys = all_keys()
    parent = ".".join(path[:-1])
    siblings = [key for key in keys if key.rpartition(".")[0] == parent]
    last = {key.rpartition(".")[2]: key for key in siblings}
    near = [last[name] for name in difflib.get_close_matches(path[-1], last, 1, 0.6)]
    near = near or [key for key in keys if key.rpartition(".")[2] == path[-1]][:1]
    near = near or ([] if siblings else difflib.get_close_matches(".".join(path), keys, 1, 0.7))
    if near:
        return f" (did you mean {near[0]}?)"
    while not siblings and "." in parent:
        parent = parent.rpartition(".")[0]
        siblings = [key for key in keys if key.rpartition(".")[0] == parent]
    if not siblings:
        parent, siblings = "", list(Config.model_fields)
    return f"; {parent or 'the top level'} has {', '.join(key.rpartition('.')[2] for key in siblings)}"
