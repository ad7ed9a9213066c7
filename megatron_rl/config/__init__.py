"""The experiment configuration: schema, YAML loading and layout checks. Importable without torch."""

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.load import load_config, save_config
from megatron_rl.config.schema import Config

__all__ = ["Config", "ConfigError", "load_config", "save_config"]
