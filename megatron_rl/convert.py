"""Model folders between the Hugging Face format and Megatron's distributed checkpoint format, in the same precision."""

from pathlib import Path

import torch

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.hub import local_folder
from megatron_rl.config.model_fit import check_layout, read_hf_config
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_mapping import hf_shapes
from megatron_rl.models.megatron_folder import write_model_folder
from megatron_rl.models.stored_precision import common_precision, name_of, said_precision, stored_precisions
from megatron_rl.models.stored_tensors import has_hf_weights, has_megatron_weights
from megatron_rl.models.token_ids import load_tokenizer, read_token_ids, state_ends
from megatron_rl.models.weights import PolicyWeights, export_hf
from megatron_rl.observability.console import Console
from megatron_rl.trainer.policy import Policy


def hf_to_megatron(model: str, output: str, family: str | None = None) -> None:
    """Write a Hugging Face model as a folder that `model.path` accepts, with Megatron weights.

    Args:
        model: folder of the model, or a name on the hub once it has been downloaded.
        output: folder to write; one that exists is replaced.
        family: `model.family`.

    Raises:
        ConfigError: when `model` has no Hugging Face weights.
    """
    if not has_hf_weights(model):
        raise ConfigError(f"{model!r} has no *.safetensors; give a folder with a Hugging Face model.")
    console = Console(enabled=True)
    policy = _load(model, output, family, console)
    console.info(f"writing {output}")
    write_model_folder({"model": policy.model.sharded_state_dict()}, model, Path(output))
    shutdown()
    console.info(f"{output} is a model in Megatron's format; use it with model.path={output}")


def megatron_to_hf(checkpoint: str, output: str, family: str | None = None) -> None:
    """Write a run's checkpoint or a converted folder as a Hugging Face model.

    Args:
        checkpoint: `run_dir/checkpoints/step_...`, or what `hf_to_megatron` wrote.
        output: folder to write; one that exists is replaced.
        family: `model.family`.

    Raises:
        ConfigError: when `checkpoint` has no Megatron weights.
    """
    if not has_megatron_weights(checkpoint):
        raise ConfigError(
            f"{checkpoint!r} has no megatron/metadata.json; give a checkpoint folder such as step_000020."
        )
    console = Console(enabled=True)
    policy = _load(checkpoint, output, family, console)
    with console.progress("writing") as progress:
        export_hf(PolicyWeights(policy.model, policy.arch), checkpoint, Path(output), progress)
    _agree(output, policy.arch, console)
    shutdown()
    console.info(f"{output} is a model in the Hugging Face format")


def _load(model: str, output: str, family: str | None, console: Console) -> Policy:
    """The model, its weights in the precision in which they are stored."""
    console.info(f"reading {model}")
    config = Config.model_validate(
        {
            "model": {"path": model, "family": family},
            # Nothing is generated, so no length can be too long for the model.
            "data": {"max_prompt_tokens": 1},
            "rollout": {"max_tokens": 1},
            "run_dir": output,
        }
    )
    check_layout(config, read_hf_config(model, family))
    arch = Architecture.from_folder(model, family)
    dtype = _precision(model, arch, console)
    # In float32, halves of another kind than bfloat16 lose nothing.
    held = config.model.model_copy(update={"precision": "bf16" if dtype == torch.bfloat16 else "fp32"})
    config = config.model_copy(update={"model": held})
    policy = Policy(config, initialize(config), arch, arch.vocab_size, temperature=1.0)
    policy.model.to(dtype)
    policy.model.config.params_dtype = dtype
    return policy


def _precision(model: str, arch: Architecture, console: Console) -> torch.dtype:
    """The precision to write `model` in, which keeps all of its bits; what differs from its files is said."""
    found = stored_precisions(model, hf_shapes(arch))
    dtype, said = common_precision(found), said_precision(local_folder(model))
    name = name_of(dtype)
    if arch.quantization:
        console.info(f"its quantized weights are written as the numbers they stand for, in {name}")
    elif len(found) > 1:
        console.info(f"its weights are of {' and '.join(sorted(map(name_of, found)))}: all are written as {name}")
    elif found == {torch.float64}:
        console.info(f"its weights are float64, which is rounded to {name}")
    if said not in (None, name):
        console.info(f"its config.json says {said}, but the weights are written as {name}, and the new one says so")
    return dtype


def _agree(output: str, arch: Architecture, console: Console) -> None:
    """Let the new folder's files name the same ends, where its tokenizer loads; otherwise they are as they were."""
    try:
        tokens = read_token_ids(output, load_tokenizer(output), arch.vocab_size)
    except ConfigError as error:
        console.info(f"the tokenizer and configurations are copied as they are: {error}")
        return
    if state_ends(Path(output), tokens):
        console.info(f"its generation_config.json now names every end of a response: {list(tokens.ends)}")
