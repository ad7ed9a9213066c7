"""A model with gradients, a distributed optimizer and a learning rate: what policy and critic have in common."""

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from drafter.idle_time.pipeline_bubbles import BubbleCommunicator
from drafter.idle_time.wait_filler import ThreadFill
from megatron_rl.config import Config
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.metrics import Metrics
from megatron_rl.models.architecture import Architecture
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.moe_routing import Routing
from megatron_rl.trainer.pipeline_model import LossFunction, OutputHead, PipelineModel, Progress, is_first_copy
from megatron_rl.trainer.schedule import learning_rate
from megatron_rl.trainer.update_guard import UpdateGuard


class TrainedModel(PipelineModel):
    """A `PipelineModel` with DDP and an optimizer, as the section `train` has them."""

    def __init__(
        self, config: Config, runtime: Runtime, arch: Architecture, head: OutputHead, steps: int | None = None
    ) -> None:
        """Build this rank's part and its optimizer.

        Args:
            config: the experiment.
            runtime: this process's place.
            arch: shape of the model.
            head: what is read from the model's output.
            steps: RL steps that the schedule of the learning rate spans; None: `train.steps`.
        """
        super().__init__(config, runtime, arch, head)
        train = config.train
        self.ddp = DistributedDataParallel(
            self.model.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=True, overlap_grad_reduce=False, grad_reduce_in_fp32=True
            ),
            self.model,
        )
        self.module = self.ddp
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=train.lr,
                weight_decay=train.weight_decay,
                adam_beta1=train.adam_beta1,
                adam_beta2=train.adam_beta2,
                clip_grad=train.clip_grad,
                bf16=config.model.precision != "fp32",
                params_dtype=self.model.config.params_dtype,
                use_distributed_optimizer=True,
            ),
            [self.ddp],
        )
        # By these two, megatron-core's schedules finish and scale gradients.
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.model.config.grad_scale_func = self.optimizer.scale_loss
        self.routing = Routing(self.model, config) if arch.experts else None
        self.updates = 0
        """Optimizer steps so far."""
        self._total_updates = (train.steps if steps is None else steps) * train.num_minibatches
        self._guard = UpdateGuard(runtime, train.max_skipped_updates)

    def fill_bubbles(self, fill: ThreadFill) -> BubbleCommunicator:
        """From now on, run slices while this pipeline stage waits for others. Does not change what is computed."""
        config = self.model.config
        self._bubbles = BubbleCommunicator(parallel_state.get_pipeline_model_parallel_group(), config, fill)
        config.finalize_model_grads_func = self._bubbles.flushing(finalize_model_grads)
        return self._bubbles

    def _optimize(self, batch: Batch, loss: LossFunction, progress: Progress | None) -> Metrics:
        """One optimizer step on the whole of `batch`, which carries the `weights` of its tokens.

        Returns:
            On rank 0 the sums of what `loss` measured, `grad_norm`, `lr`, `skipped` (1 when no token has a weight) and
            `not_finite` (1 when loss or gradient is not finite; the model is as it was); elsewhere an empty dict.

        Raises:
            RuntimeError: on all ranks, after `train.max_skipped_updates` in a row that were not finite.
        """
        self.module.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.routing is not None:
            self.routing.start(batch.sequence_tokens)
        results = self._run(batch, loss, forward_only=False, progress=progress)
        rate = learning_rate(self.config.train, self.updates, self._total_updates)
        # Nothing to learn from: momentum and weight decay must not move the weights either.
        skipped = not bool(batch.values["weights"].any())
        if skipped:
            rate = 0.0
        self._set_groups(rate)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        self.updates += 1
        finite = self._guard.allows(self.updates, [float(result["loss"]) for result in results], grad_norm)
        if finite:
            self.optimizer.step()
        metrics = self._sum_on_driver(results)
        own = {
            "grad_norm": grad_norm,
            "lr": rate if finite else 0.0,
            "skipped": float(skipped),
            "not_finite": float(not finite),
        }
        if self.routing is not None:
            own |= self.routing.metrics(self.runtime.control_group)
        return metrics | own if self.runtime.is_driver else {}

    def _set_groups(self, rate: float) -> None:
        """Set what the groups of parameters are updated by; a checkpoint has brought the settings of an earlier run.

        megatron-core marks norms and biases for its own scheduler, which would exempt them from weight decay.
        """
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = rate
            group["weight_decay"] = train.weight_decay * (1.0 if train.decay_all else group["wd_mult"])
            group["betas"] = (train.adam_beta1, train.adam_beta2)

    def _sum_on_driver(self, results: list[dict[str, torch.Tensor]]) -> Metrics:
        mine: Metrics = {}
        if is_first_copy():
            for result in results:
                for name, tensor in result.items():
                    mine[name] = mine.get(name, 0.0) + float(tensor)
        gathered: list[Metrics] | None = [{}] * self.runtime.world_size if self.runtime.is_driver else None
        torch.distributed.gather_object(mine, gathered, dst=0, group=self.runtime.control_group)
        total: Metrics = {}
        for part in gathered or []:
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total


def mean_metrics(parts: list[Metrics]) -> Metrics:
    """Means over mini-batches of what each measured; an empty dict where they measured nothing."""
    return {name: sum(metrics[name] for metrics in parts) / len(parts) for name in parts[0]}
