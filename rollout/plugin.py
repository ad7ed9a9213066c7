"""The entry point through which vLLM loads this package (`vllm.general_plugins`), in each of its processes.

Without `MEGATRON_RL_PLUGIN=1` in the environment it changes nothing in vLLM. Its settings travel as environment
variables because vLLM starts worker processes of its own:

- `MEGATRON_RL_VOCAB_LIMIT`: token ids from this one on are never sampled (the size of the tokenizer).
- `MEGATRON_RL_DISABLE_AMX=1`: vLLM is told that the CPU has no AMX tiles, for machines that advertise but lack them.
"""

import os

from megatron_rl.config import ConfigError

ENABLE = "MEGATRON_RL_PLUGIN"
VOCAB_LIMIT = "MEGATRON_RL_VOCAB_LIMIT"
DISABLE_AMX = "MEGATRON_RL_DISABLE_AMX"


def register() -> None:
    """Install coupled sampling, online quantization and the `shm` weight transfer in this process; any number of times.

    Raises ConfigError for a setting that is no number, RuntimeError for a vLLM version that is not among the tested.
    """
    if os.environ.get(ENABLE) != "1":
        return
    from rollout.online_quantization import register_online_quantization
    from rollout.shm_transfer import register_shm_transfer
    from rollout.vllm_patch import install_coupled_sampling

    if os.environ.get(DISABLE_AMX) == "1":
        import torch

        torch.cpu._is_amx_tile_supported = lambda: False
    install_coupled_sampling(_vocab_limit())
    register_shm_transfer()
    register_online_quantization()


def _vocab_limit() -> int | None:
    text = os.environ.get(VOCAB_LIMIT)
    if text is None:
        return None
    if not text.isdigit() or int(text) == 0:
        raise ConfigError(f"The environment variable {VOCAB_LIMIT} is {text!r}; set it to the size of the tokenizer.")
    return int(text)
