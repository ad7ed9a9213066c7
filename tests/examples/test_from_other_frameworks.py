"""`docs/from-other-frameworks.md` names keys of ours that exist."""

import re
from functools import reduce
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter

from megatron_rl.config import Config
from megatron_rl.config.load import all_keys, section_type
from tests.launching import ROOT

PAGE = ROOT / "docs" / "from-other-frameworks.md"
OPEN_SECTIONS = ("rollout.vllm", "rollout.sampling", "model.megatron")
"""Keys that take a library's options by their own names."""


def keys_of_ours() -> list[str]:
    """What stands in backticks in the first column of every table, and in the last section."""
    text = PAGE.read_text()
    columns = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    last = text.partition("## What has none there")[2]
    assert last, "the page has no section of what only we have"
    return re.findall(r"`([^`]+)`", " ".join(columns) + last)


def annotation(key: str) -> Any:
    """The type of a key's value."""

    def enter(model: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
        assert model is not None
        return section_type(model.model_fields[name].annotation)

    *sections, last = key.split(".")
    section = reduce(enter, sections, Config)
    assert section is not None
    return section.model_fields[last].annotation


@pytest.mark.parametrize("key", sorted({key for key in keys_of_ours() if not key.endswith(".md")}))
def test_every_key_of_ours_on_the_page_is_in_the_schema(key: str) -> None:
    if key in ("ppo", "mask"):  # values, explained beside a key
        return
    name, _, value = key.partition("=")
    if name.rpartition(".")[0] in OPEN_SECTIONS:
        name = name.rpartition(".")[0]
    assert name in all_keys()
    if value:
        TypeAdapter(annotation(name)).validate_python(yaml.safe_load(value))


def test_the_page_covers_the_sections_that_people_look_for() -> None:
    keys = {key.partition("=")[0] for key in keys_of_ours()}
    assert len(keys) > 80
    for section in Config.model_fields:
        assert [key for key in keys if key.startswith(section)], f"no key of {section}"
    with pytest.raises(KeyError):
        annotation("train.no_such_key")
