"""The policy's forward and update passes over megatron-core's pipeline schedules.

Every rank calls every method with the same batch; data-parallel ranks take their shares of it, pipeline stages and
tensor-parallel parts take their places by megatron-core's groups.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from drafter.idle_time.pipeline_bubbles import BubbleCommunicator
from drafter.idle_time.wait_filler import ThreadFill
from megatron_rl.algorithms import (
    PolicyTokens,
    TokenCorrection,
    correct_mismatch,
    load_algorithm,
    policy_objective,
    token_weights,
)
from megatron_rl.config import Config
from megatron_rl.config.schema import Train
from megatron_rl.distributed.device import Runtime
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.context_parallel import join
from megatron_rl.models.gpt import build_policy
from megatron_rl.models.vocab_parallel_logprobs import token_logprobs
from megatron_rl.models.weights import PolicyWeights, draw_weights, has_hf_weights, load_hf_weights
from megatron_rl.trainer.batch import Batch, Microbatch, build_microbatch, plan_microbatches, with_values
from megatron_rl.trainer.checkpoint import has_megatron_weights, load_megatron_weights
from megatron_rl.trainer.moe_routing import Routing
from megatron_rl.trainer.update_guard import UpdateGuard

Progress = Callable[[int, int], None]
"""Called with (micro-batches done, micro-batches in all) of this rank."""
Metrics = dict[str, float]
LossFunction = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(micro-batch, logprobs [tokens], entropies [tokens]) -> (this micro-batch's part of the loss, of the metrics).

A critic has values [tokens] in place of the two."""
PlacedValues = tuple[torch.Tensor, torch.Tensor]
"""(places in the flat layout, int64 [tokens] on the CPU; their values, float32 [tokens] on the device)."""


def learning_rate(train: Train, update: int, total_updates: int) -> float:
    """Learning rate of optimizer step `update` (counted from 0): linear warm-up, then the configured decay."""
    if update < train.warmup_steps:
        return train.lr * (update + 1) / train.warmup_steps
    span = max(total_updates - train.warmup_steps, 1)
    progress = min((update - train.warmup_steps) / span, 1.0)
    if train.lr_schedule == "constant":
        share = 1.0
    elif train.lr_schedule == "linear":
        share = 1 - progress
    else:
        share = 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))
    return train.lr * (train.min_lr_ratio + (1 - train.min_lr_ratio) * share)


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps (0: never) and after the last one happens now."""
    return step == last or (every > 0 and step % every == 0)


def _is_first_copy() -> bool:
    """Whether this rank's log-probs count: those of its tensor- and context-parallel peers are the same."""
    peers = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank()
    return peers == (0, 0)


class Policy:
    """A model for forward passes: the frozen reference, or the base of the trained policy."""

    def __init__(
        self, config: Config, runtime: Runtime, arch: Architecture, vocab_limit: int, temperature: float
    ) -> None:
        """Build this rank's part and load its weights from `config.model.path`, or draw them for `model.scratch`.

        Args:
            config: the experiment.
            runtime: this process's place.
            arch: shape of the model.
            vocab_limit: token ids from here on are excluded from every distribution.
            temperature: divides the logits of every distribution.
        """
        self.config, self.runtime, self.arch = config, runtime, arch
        self.vocab_limit, self.temperature = vocab_limit, temperature
        self.model: GPTModel = build_policy(config, arch)
        if has_megatron_weights(config.model.path):
            load_megatron_weights(self.model, config.model.path)
        elif config.model.scratch is not None and not has_hf_weights(config.model.path):
            draw_weights(self.model, arch, config.train.seed)
        else:
            load_hf_weights(self.model, arch, config.model.path)
        self._attach_head()
        self.module: torch.nn.Module = self.model
        self.bubbles: BubbleCommunicator | None = None
        self.on_microbatch: Callable[[Microbatch], None] | None = None
        """Called with each micro-batch before its forward pass."""

    def fill_bubbles(self, fill: ThreadFill) -> BubbleCommunicator:
        """From now on, run slices while this pipeline stage waits for others. Does not change what is computed."""
        config = self.model.config
        self.bubbles = BubbleCommunicator(parallel_state.get_pipeline_model_parallel_group(), config, fill)
        if config.finalize_model_grads_func is not None:
            config.finalize_model_grads_func = self.bubbles.flushing(config.finalize_model_grads_func)
        return self.bubbles

    def logprobs(self, batch: Batch, progress: Progress | None = None) -> Float[torch.Tensor, "tokens"]:
        """Log-probabilities of all response tokens, float32 [tokens] on every rank's CPU."""
        return self._per_token(batch, progress)

    def _attach_head(self) -> None:
        """Called once the weights are loaded. A policy keeps the model's output layer."""

    @torch.no_grad()
    def _per_token(self, batch: Batch, progress: Progress | None) -> Float[torch.Tensor, "tokens"]:
        """The first of what `_read` gives for all response tokens, float32 [tokens] on every rank's CPU."""
        self.module.eval()
        return self._gather(batch, self._run(batch, None, forward_only=True, progress=progress))

    def _gather(self, batch: Batch, found: list[PlacedValues]) -> Float[torch.Tensor, "tokens"]:
        """What the ranks found for their micro-batches, for all response tokens on every rank."""
        flat = torch.zeros(batch.tokens)
        if _is_first_copy():
            for places, values in found:
                flat[places] = values.cpu()
        # Each token was scored by one data-parallel rank; all others hold zeros.
        torch.distributed.all_reduce(flat, group=self.runtime.control_group)
        return flat

    def _run(
        self, batch: Batch, loss_function: LossFunction | None, forward_only: bool, progress: Progress | None
    ) -> list[Any]:
        """One pass of this rank's share through the pipeline schedule.

        Returns, on the last stage: per micro-batch (flat places, their values) without a loss, else the metrics.
        """
        lengths = [batch.sequence_length(index) for index in range(len(batch.prompts))]
        budget = self.config.train.tokens_per_microbatch
        replicas = parallel_state.get_data_parallel_world_size()
        shares = plan_microbatches(lengths, budget, replicas, equally_many=self.config.parallel.ep_size > 1)
        rows = shares[parallel_state.get_data_parallel_rank()]
        multiple = self.config.parallel.tp_size if self.config.parallel.sequence_parallel else 1
        part = parallel_state.get_context_parallel_rank(), self.config.parallel.cp_size

        def microbatches() -> Iterator[Microbatch]:
            for done, row in enumerate(rows):
                yield build_microbatch(batch, row, multiple, self.runtime.device, part)
                if progress is not None:
                    progress(done + 1, len(rows))

        pipeline = self.bubbles.start_pass(len(rows), forward_only) if self.bubbles is not None else {}
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, loss_function),
            data_iterator=microbatches(),
            model=[self.module],
            num_microbatches=len(rows),
            seq_length=budget,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=loss_function is None,
            **pipeline,
        )
        return results

    def _forward_step(
        self, loss_function: LossFunction | None, iterator: Iterator[Microbatch], module: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        microbatch = next(iterator)
        self.model.selected_rows = microbatch.rows
        if self.on_microbatch is not None:
            self.on_microbatch(microbatch)
        output = module(microbatch.input_ids, None, None, packed_seq_params=microbatch.packing)
        return output, partial(self._finish, microbatch, loss_function)

    def _finish(
        self,
        microbatch: Microbatch,
        loss_function: LossFunction | None,
        output: torch.Tensor,
        non_loss_data: bool = False,
    ) -> Any:
        output = output[0]
        if self.config.parallel.sequence_parallel:
            output = output.index_select(0, microbatch.rows)
        values = self._read(microbatch, output)
        if microbatch.own is not None:
            total, group = len(microbatch.flat_index), parallel_state.get_context_parallel_group()
            values = tuple(join(part, microbatch.own, total, group, sum_gradients=False) for part in values)
        if loss_function is None:
            return microbatch.flat_index, values[0]
        loss, metrics = loss_function(microbatch, *values)
        # With zero counted tokens megatron-core leaves the gradient as it is: the weights are already normalised.
        return loss, torch.zeros((), dtype=torch.int64, device=loss.device), metrics

    def _read(self, microbatch: Microbatch, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the output layer's rows [tokens, ...] say about the response tokens: logprobs and entropies [tokens]."""
        return token_logprobs(
            output,
            microbatch.targets,
            self.temperature,
            self.vocab_limit,
            parallel_state.get_tensor_model_parallel_group(),
        )


class Trainer(Policy):
    """The trained policy: `Policy` with gradients, a distributed optimizer and the update passes."""

    def __init__(
        self, config: Config, runtime: Runtime, arch: Architecture, vocab_limit: int, temperature: float
    ) -> None:
        super().__init__(config, runtime, arch, vocab_limit, temperature)
        train, low_precision = config.train, config.model.precision != "fp32"
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
                bf16=low_precision,
                params_dtype=self.model.config.params_dtype,
                use_distributed_optimizer=True,
            ),
            [self.ddp],
        )
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.model.config.grad_scale_func = self.optimizer.scale_loss
        self.weights = PolicyWeights(self.model, arch)
        self.routing = Routing(self.model, config) if arch.experts else None
        self.updates = 0
        self.total_updates = train.steps * train.minibatches
        """Those that the schedule of the learning rate spans."""
        self._guard = UpdateGuard(runtime, train.max_skipped_updates)
        self.correction: TokenCorrection
        """Of the tokens of the last `update`."""
        self.old_logprobs: torch.Tensor
        """Of its batch before it, float32 [tokens] on the CPU."""

    def update(self, batch: Batch, progress: Progress | None = None) -> Metrics:
        """One RL update: `train.minibatches` optimizer steps on consecutive parts of the batch.

        `batch` carries rollout_logprobs, advantages, with a KL penalty ref_logprobs, and old_logprobs. Without the
        last, the log-probs of the update's own forward pass are taken for them (see `Config.scores_in_update`).

        Returns:
            On rank 0, means over the mini-batches of what `policy_objective` reports, of the gradient norm and learning
            rate, of `skipped`: 1 for a mini-batch whose tokens were all rejected, and of `not_finite`: 1 for one whose
            loss or gradient is no number. Both leave the policy as it is. Elsewhere an empty dict.

        Raises:
            ValueError: there are no old_logprobs, but several mini-batches or a correction that compares responses.
            RuntimeError: on all ranks, after `train.max_skipped_updates` in a row that were not finite.
        """
        parts = self.config.train.minibatches
        if "old_logprobs" not in batch.values and (parts > 1 or self.config.algorithm.correction.compares_responses):
            raise ValueError("mini-batches and corrections that compare responses need old_logprobs before the update")
        size = len(batch.prompts) // parts
        done = [self._update(batch.select(part * size, (part + 1) * size), progress) for part in range(parts)]
        collected, corrections, old = zip(*done, strict=True)
        self.correction, self.old_logprobs = TokenCorrection.of_all(corrections), torch.cat(old)
        return {name: sum(metrics[name] for metrics in collected) / parts for name in collected[0]}

    def _update(
        self, minibatch: Batch, progress: Progress | None
    ) -> tuple[Metrics, TokenCorrection, Float[torch.Tensor, "tokens"]]:
        """One optimizer step: its metrics, the correction, and the old log-probs."""
        algorithm, aggregation = load_algorithm(self.config.algorithm), self.config.algorithm.aggregation
        lengths, kept, total = minibatch.lengths, None, minibatch.tokens
        known = "old_logprobs" in minibatch.values
        if known:
            # Constants of the whole mini-batch, the same on every rank: how it is split cannot change them.
            correction = self._correct(minibatch.values, lengths)
            kept, total = correction.kept, int(correction.kept.sum())
            minibatch = with_values(minibatch, importance=correction.weights)
        weights = token_weights(lengths, aggregation, kept, self.config.rollout.max_tokens)
        found: list[PlacedValues] = []

        def loss(
            microbatch: Microbatch, logprobs: torch.Tensor, entropies: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            values, own_lengths = microbatch.values, lengths[microbatch.sequences]
            if not known:
                values = values | {"old_logprobs": logprobs.detach()}
                values["importance"] = self._correct(values, own_lengths).weights
                found.append((microbatch.flat_index, values["old_logprobs"]))
            tokens = PolicyTokens(
                new_logprobs=logprobs,
                entropy=entropies,
                old_logprobs=values["old_logprobs"],
                importance=values["importance"],
                ref_logprobs=values.get("ref_logprobs"),
                advantages=values["advantages"],
                weights=values["weights"],
                lengths=own_lengths,
                total_tokens=total,
            )
            return policy_objective(tokens, algorithm)

        metrics = self._optimize(with_values(minibatch, weights=weights), loss, progress)
        if not known:
            minibatch = with_values(minibatch, old_logprobs=self._gather(minibatch, found))
            correction = self._correct(minibatch.values, lengths)
        return metrics, correction, minibatch.values["old_logprobs"]

    def _correct(self, values: dict[str, torch.Tensor], lengths: torch.Tensor) -> TokenCorrection:
        old, rollout, reused = values["old_logprobs"], values["rollout_logprobs"], values.get("reused")
        return correct_mismatch(old, rollout, lengths, self.config.algorithm.correction, reused)

    def imitate(self, batch: Batch, progress: Progress | None = None) -> Metrics:
        """One supervised step: mean negative log-likelihood of the response tokens. Returns as `update` does."""
        batch = with_values(batch, weights=token_weights(batch.lengths, "token-mean"))

        def loss(
            microbatch: Microbatch, logprobs: torch.Tensor, entropies: torch.Tensor
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            value = -(microbatch.values["weights"] * logprobs).sum()
            return value, {"loss": value.detach()}

        return self._optimize(batch, loss, progress)

    def _optimize(self, batch: Batch, loss: LossFunction, progress: Progress | None) -> Metrics:
        self.module.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.routing is not None:
            self.routing.start(sum(batch.sequence_length(index) for index in range(len(batch.prompts))))
        results = self._run(batch, loss, forward_only=False, progress=progress)
        rate = learning_rate(self.config.train, self.updates, self.total_updates)
        # Nothing to learn from: momentum and weight decay must not move the weights either.
        skipped = not bool(batch.values["weights"].any())
        if skipped:
            rate = 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = rate
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

    def _sum_on_driver(self, results: list[dict[str, torch.Tensor]]) -> Metrics:
        mine: Metrics = {}
        if _is_first_copy():
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
