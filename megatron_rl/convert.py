"""Model folders between the Hugging Face format and Megatron's distributed checkpoint format."""

from pathlib import Path

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.model_fit import check_layout, read_hf_config
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.megatron_folder import write_model_folder
from megatron_rl.models.stored_tensors import has_hf_weights, has_megatron_weights
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
    shutdown()
    console.info(f"{output} is a model in the Hugging Face format")


def _load(model: str, output: str, family: str | None, console: Console) -> Policy:
    console.info(f"reading {model}")
    hf = read_hf_config(model, family)
    stored = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16")
    precision = "fp32" if stored == "float32" else "bf16"
    config = Config.model_validate(
        {
            "model": {"path": model, "family": family, "precision": precision},
            # Nothing is generated, so no length can be too long for the model.
            "data": {"max_prompt_tokens": 1},
            "rollout": {"max_tokens": 1},
            "run_dir": output,
        }
    )
    check_layout(config, hf)
    runtime = initialize(config)
    arch = Architecture.from_folder(model, family)
    return Policy(config, runtime, arch, arch.vocab_size, temperature=1.0)
