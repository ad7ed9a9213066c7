"""Which layers `rollout.quantization_skip` names, by the layers' names in the Hugging Face format."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from megatron_rl.config.errors import ConfigError

PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def skip_patterns(entries: Iterable[str], layers: int) -> list[str]:
    """The entries as name patterns (`fnmatch`): `first:N` and `last:N` become the names of those decoder layers.

    Raises:
        ConfigError: for an entry that names none of the linear layers of a model with so many decoder layers.
    """
    patterns: list[str] = []
    for entry in entries:
        kind, _, count = entry.partition(":")
        if kind in ("first", "last"):
            if not count.isdigit() or not 1 <= int(count) <= layers:
                raise ConfigError(
                    f"rollout.quantization_skip has {entry!r}; give a number from 1 to {layers}, the model's layers, "
                    "such as first:1."
                )
            start = 0 if kind == "first" else layers - int(count)
            patterns += [f"model.layers.{start + offset}.*" for offset in range(int(count))]
            continue
        if not any(
            fnmatchcase(f"model.layers.{layer}.{name}", entry) for layer in range(layers) for name in PROJECTIONS
        ):
            raise ConfigError(
                f"rollout.quantization_skip has {entry!r}, which names no linear layer; write first:N, last:N or a "
                "pattern such as *.down_proj or model.layers.3.*."
            )
        patterns.append(entry)
    return patterns


def is_skipped(names: list[str], patterns: list[str]) -> bool:
    """Whether one of the names matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
