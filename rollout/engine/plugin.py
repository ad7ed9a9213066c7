"""The entry point through which vLLM loads this package (`vllm.general_plugins`), in each of its processes.

It changes nothing in vLLM without `MEGATRON_RL_PLUGIN=1` in the environment, which engines of ours have, and without
the variables of `rollout.engine.flashrl`, which are for engines of other frameworks. Its settings travel as environment
variables because vLLM starts worker processes of its own:

- `MEGATRON_RL_VOCAB_LIMIT`: token ids from this one on are never sampled (which the tokenizer does not know).
- `MEGATRON_RL_DISABLE_AMX=1`: vLLM does not use AMX tiles, for machines that advertise but lack them.
"""

import os

from megatron_rl.config import ConfigError

ENABLE = "MEGATRON_RL_PLUGIN"
VOCAB_LIMIT = "MEGATRON_RL_VOCAB_LIMIT"
DISABLE_AMX = "MEGATRON_RL_DISABLE_AMX"


def register() -> None:
    """Install coupled sampling, online quantization and the `shm` weight transfer in this process; bind its sockets.

    In engines of other frameworks, install what the variables of `rollout.engine.flashrl` say. Further calls change
    nothing.

    Raises:
        ConfigError: a setting is wrong.
        RuntimeError: the installed vLLM is not among the tested versions.
    """
    others = sorted(name for name in os.environ if name.startswith("FLASHRL_"))
    if os.environ.get(ENABLE) != "1":
        if others:
            from rollout.engine.flashrl import install_drop_in

            install_drop_in()
        return
    if others:
        raise ConfigError(f"{others[0]} is for engines of other frameworks; unset it and set rollout.quantization.")
    from rollout.engine.vllm_patches import install_coupled_sampling
    from rollout.quantization.online import register_online_quantization
    from rollout.tcp_store import bind_process_groups
    from rollout.weight_transfer.shm import register_shm_transfer

    if os.environ.get(DISABLE_AMX) == "1":
        import torch

        torch.cpu._is_amx_tile_supported = lambda: False
    bind_process_groups()
    install_coupled_sampling(_vocab_limit())
    register_shm_transfer()
    register_online_quantization()


def _vocab_limit() -> int | None:
    text = os.environ.get(VOCAB_LIMIT)
    if text is None:
        return None
    if not text.isdigit() or int(text) == 0:
        raise ConfigError(f"The environment variable {VOCAB_LIMIT} is {text!r}; set it to a positive number.")
    return int(text)
