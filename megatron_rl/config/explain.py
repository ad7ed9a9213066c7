"""What `megatron-rl config --explain` prints: the schema, as text."""

import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.load import section_type, suggestion
from megatron_rl.config.schema import Config


def explain(key: str | None = None) -> str:
    """Type, default, choices and meaning of one key; the keys of a section; or, without `key`, all keys.

    Raises:
        ConfigError: when there is no such key, with a suggestion.
    """
    if key is None:
        return "\n\n".join(_describe_section(Config, ""))
    field = _find(key)
    section = section_type(field.annotation)
    if section is None:
        return _describe_value(key, field)
    return "\n\n".join([f"{key}: {_meaning(field)}{_optional(field)}", *_describe_section(section, key + ".")])


def _find(key: str) -> FieldInfo:
    model: type[BaseModel] | None = Config
    field: FieldInfo | None = None
    for part in key.split("."):
        field = None if model is None else model.model_fields.get(part)
        if field is None:
            raise ConfigError(f"unknown key {key}{suggestion(key.split('.'))}.")
        model = section_type(field.annotation)
    assert field is not None
    return field


def _describe_section(section: type[BaseModel], prefix: str) -> list[str]:
    texts = []
    for name, field in section.model_fields.items():
        inner = section_type(field.annotation)
        if inner is None:
            texts.append(_describe_value(prefix + name, field))
        else:
            texts.append(f"{prefix}{name}: {_meaning(field)}{_optional(field)}")
            texts += _describe_section(inner, f"{prefix}{name}.")
    return texts


def _describe_value(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"default {_show(field.get_default(call_default_factory=True))}"
    return f"{key}: {_type_name(field.annotation)}{_bounds(field)}, {default}\n    {_meaning(field)}"


def _optional(field: FieldInfo) -> str:
    return "" if field.is_required() or field.default is not None else " Default: null (none)."


def _meaning(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_type_name(choice) for choice in arguments)
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):  # such as PositiveInt | None, which pydantic leaves as it is
        return _type_name(arguments[0]) + _limits(annotation.__metadata__)
    name: str = annotation.__name__
    return {"NoneType": "null", "str": "text", "bool": "true | false"}.get(name, name)


def _bounds(field: FieldInfo) -> str:
    return _limits(field.metadata)


def _limits(metadata: Any) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    found = [
        f"{sign} {getattr(limit, name)}" for limit in metadata for name, sign in signs.items() if hasattr(limit, name)
    ]
    return f" ({', '.join(found)})" if found else ""


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else "''"
