"""The policy's forward and update passes over megatron-core's pipeline schedules.

Every rank calls every method with the same batch; data-parallel ranks take their shares of it, pipeline stages and
tensor-parallel parts take their places by megatron-core's groups.
"""

import torch
from jaxtyping import Float
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_rl.algorithms import (
    PolicyTokens,
    TokenCorrection,
    correct_mismatch,
    load_algorithm,
    policy_objective,
    token_weights,
)
from megatron_rl.config import Config
from megatron_rl.distributed.runtime import Runtime
from megatron_rl.metrics import Metrics
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.weights import PolicyWeights
from megatron_rl.trainer.batch import Batch, Microbatch, with_values
from megatron_rl.trainer.moe_routing import Routing
from megatron_rl.trainer.policy import LossFunction, PlacedValues, Policy, Progress, _is_first_copy
from megatron_rl.trainer.schedule import learning_rate
from megatron_rl.trainer.update_guard import UpdateGuard


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
        self.total_updates = train.steps * train.num_minibatches
        """Those that the schedule of the learning rate spans."""
        self._guard = UpdateGuard(runtime, train.max_skipped_updates)
        self.correction: TokenCorrection
        """Of the tokens of the last `update`."""
        self.old_logprobs: torch.Tensor
        """Of its batch before it, float32 [tokens] on the CPU."""

    def update(self, batch: Batch, progress: Progress | None = None) -> Metrics:
        """One RL update: `train.num_minibatches` optimizer steps on consecutive parts of the batch.

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
        parts = self.config.train.num_minibatches
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
