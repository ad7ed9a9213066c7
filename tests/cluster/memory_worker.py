"""Takes one supervised step and says what this rank has allocated for it, and what `plan` expected.

memory_worker MODEL TP PP PRECISION OUTPUT
"""

import json
import sys
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_rl.cluster.plan_memory import norm_activations, trainer_memory
from megatron_rl.config import Config
from megatron_rl.distributed.runtime import initialize, shutdown
from megatron_rl.models.architecture import Architecture
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.trainer import Trainer

TOKENS = 256


class SavedTensors:
    """Bytes that autograd keeps for backward passes, each storage once, parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self._sizes: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # so that no two storages have the same address

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._alive.append(tensor)
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def total(self) -> int:
        return sum(self._sizes.values())


def measure(trainer: Trainer) -> dict[str, float]:
    """Bytes by the names of `Memory`; `logits` are within `activations`, without their gradient."""
    # Two micro-batches of TOKENS for each replica, half prompt and half response.
    sequences = 4 * parallel_state.get_data_parallel_world_size()
    batch = Batch([[5] * (TOKENS // 4)] * sequences, [[7] * (TOKENS // 4)] * sequences)
    saved = SavedTensors(trainer.model)
    with saved.hooks():
        trainer.imitate(batch)
    buffers = trainer.ddp.buffers + trainer.ddp.expert_parallel_buffers
    adams = [optimizer.optimizer for optimizer in trainer.optimizer.chained_optimizers]
    moments = [value for adam in adams for state in adam.state.values() for value in state.values()]
    masters = [weight for adam in adams for group in adam.param_groups for weight in group["params"]]
    own_masters = trainer.config.model.precision != "fp32"  # otherwise they are views of the weights
    return {
        "weights": sum(parameter.nbytes for parameter in trainer.model.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(tensor.nbytes for tensor in [*moments, *(masters if own_masters else [])]),
        "activations": saved.total() / 2,  # both micro-batches have been counted
    }


def main() -> None:
    path, tp, pp, precision, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5])
    config = Config.model_validate(
        {
            "model": {"path": path, "precision": precision},
            "parallel": {"tp_size": tp, "pp_size": pp},
            "data": {"max_prompt_tokens": 64},
            "rollout": {"max_tokens": 64},
            "train": {"tokens_per_microbatch": TOKENS},
            "run_dir": "unused",
        }
    )
    runtime = initialize(config)
    arch = Architecture.from_folder(path)
    trainer = Trainer(config, runtime, arch, arch.vocab_size, 1.0)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    dp = parallel_state.get_data_parallel_world_size()
    planned = trainer_memory(config, arch, dp, microbatches=1, stage=stage, fused=False)
    # Half of the tokens are responses, and the gradient of the logits is not kept for a backward pass.
    kept = planned.activations + planned.logits / 4
    if stage == pp - 1:  # the last norm, too small for the plan
        kept += TOKENS * norm_activations(arch.hidden_size, 4 if precision == "fp32" else 2, fused=False)
    expected = {name: getattr(planned, name) for name in ("weights", "gradients", "optimizer")} | {"activations": kept}
    (output / f"rank{runtime.rank}.json").write_text(json.dumps([measure(trainer), expected]))
    shutdown()


if __name__ == "__main__":
    main()
