"""Expected time of one RL step on given GPUs, and what limits it. The arithmetic is explained in docs/plan.md.

A roofline: each phase takes as long as its arithmetic or its memory traffic, whichever is slower, at a share of what
the maker of the GPU promises. Good to a factor of two or so; better for comparing two layouts.
"""

import math
from dataclasses import dataclass

from megatron_rl.algorithms import needs_critic
from megatron_rl.cluster.plan_memory import (
    engine_memory,
    expert_parameters,
    held_experts,
    layer_parameters,
    model_parameters,
)
from megatron_rl.config import Config
from megatron_rl.models.architecture import Architecture

TRAINING_EFFICIENCY = 0.4
"""Share of the peak that the trainer's matrix products reach, its communication included."""
DECODING_EFFICIENCY = 0.6
"""Share of the memory bandwidth that decoding reaches."""


@dataclass(frozen=True)
class Gpu:
    """Figures of a GPU's data sheet, dense."""

    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes/s."""
    flops: float
    """bf16, per second."""
    low_precision: dict[str, float]
    """Speed of its int8 and fp8 products over bf16; those that it lacks are missing."""
    network: float
    """Bytes/s out of the node, per GPU, as these nodes are usually built."""


GPUS = {
    "a100-80": Gpu(80e9, 2.0e12, 312e12, {"int8": 2.0}, 25e9),
    "h100": Gpu(80e9, 3.35e12, 989e12, {"int8": 2.0, "fp8": 2.0}, 50e9),
    "h200": Gpu(141e9, 4.8e12, 989e12, {"int8": 2.0, "fp8": 2.0}, 50e9),
}


@dataclass(frozen=True)
class Workload:
    """What one step has to do."""

    prompt_tokens: float
    """Mean length of a prompt."""
    response_tokens: float
    """Mean length of a response."""
    sequences: int

    @property
    def tokens(self) -> float:
        """Of all sequences."""
        return self.sequences * (self.prompt_tokens + self.response_tokens)


def microbatches(config: Config, load: Workload, dp: int) -> int:
    """Micro-batches of one optimizer step on one replica."""
    return max(math.ceil(load.tokens / config.train.num_minibatches / dp / config.train.tokens_per_microbatch), 1)


def bubble_fraction(pp: int, count: int) -> float:
    """Share of a 1F1B pass in which a stage waits: (pp - 1) / (micro-batches + pp - 1); arXiv 2104.04473."""
    return (pp - 1) / (count + pp - 1)


def flops_per_token(arch: Architecture, length: float) -> float:
    """Of a forward pass: 2 per parameter that multiplies, and 4 per query width and visible position (half of all)."""
    matrices, _ = layer_parameters(arch)
    mixture = feed_forward_products(arch) if arch.experts else 0
    products = (matrices + mixture) * arch.layers + arch.vocab_size * arch.hidden_size
    attention = 4 * arch.layers * arch.heads * arch.head_dim * length / 2
    return 2 * products + attention


def feed_forward_products(arch: Architecture) -> int:
    """Parameters that one layer multiplies a token with, without attention; of a mixture, router and chosen experts."""
    if not arch.experts:
        return expert_parameters(arch)
    return arch.experts_per_token * expert_parameters(arch) + arch.experts * arch.hidden_size


def feed_forward_fraction(arch: Architecture, length: float) -> float:
    """Of the operations of a forward pass."""
    return 2 * arch.layers * feed_forward_products(arch) / flops_per_token(arch, length)


@dataclass(frozen=True)
class Generation:
    """Decoding in the engines of one precision."""

    precision: str
    batch: float
    """Mean number of requests that an engine works on."""
    tokens_per_s: float
    """Of one engine."""
    limit: str


def generation(config: Config, arch: Architecture, gpu: Gpu, load: Workload, precision: str) -> Generation:
    """Speed of one engine: a decoding step reads the weights once, and each request's keys and values."""
    tp = config.rollout.tp_size
    memory = engine_memory(config, arch, gpu.memory, precision)
    length = load.prompt_tokens + load.response_tokens / 2  # halfway through
    room = max(memory.cache / (memory.per_token * length), 1)
    share = load.sequences / config.rollout.engines
    batch = min(share, room, float(config.rollout.vllm.get("max_num_seqs", share)))
    kind = "int8" if precision == "int8" else "fp8"
    faster = gpu.low_precision.get(kind, 1.0) if precision != "none" else 1.0
    weights = memory.weights - idle_experts(config, arch, batch)
    reading = (weights + batch * memory.per_token * length) / (gpu.bandwidth * DECODING_EFFICIENCY)
    computing = batch * flops_per_token(arch, length) / tp / (gpu.flops * faster * TRAINING_EFFICIENCY)
    if computing > reading:
        limit = "arithmetic"
    elif batch < share:
        limit = "room for keys and values"
    elif weights > batch * memory.per_token * length:
        limit = "reading the weights (more requests or fewer bytes per weight help)"
    else:
        limit = "reading keys and values"
    return Generation(precision, batch, batch / max(reading, computing), limit)


def idle_experts(config: Config, arch: Architecture, batch: float) -> float:
    """Bytes of the experts, on a GPU of an engine, that no token of a decoding step goes to, with even routing."""
    if not arch.experts:
        return 0.0
    width = 4 if config.model.precision == "fp32" else 2
    missed = (1 - arch.experts_per_token / arch.experts) ** batch
    return missed * width * held_experts(arch, 1, 1) / config.rollout.tp_size


@dataclass(frozen=True)
class StepTime:
    """Seconds of the phases of a step."""

    generate: float
    old_logprobs: float
    ref_logprobs: float
    values: float
    critic_update: float
    update: float
    weight_sync: float
    beside: bool
    """Engines on GPUs of their own generate for later steps while the trainer works."""

    def phases(self) -> dict[str, float]:
        """By the names of the metrics `time/...`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "beside"}

    @property
    def total(self) -> float:
        """Of all phases, one after the other or, but for the weight sync, generation beside the others."""
        training = sum(self.phases().values()) - self.generate - self.weight_sync
        together = max(self.generate, training) if self.beside else self.generate + training
        return together + self.weight_sync


def step_time(config: Config, arch: Architecture, gpu: Gpu, load: Workload, dp: int) -> StepTime:
    """Seconds of a step with `dp` replicas of the trainer."""
    parallel = config.parallel
    rates = [generation(config, arch, gpu, load, precision).tokens_per_s for precision in config.rollout.precisions]
    speed = gpu.flops * TRAINING_EFFICIENCY * dp * parallel.model_size
    if config.model.precision == "fp8":
        speed *= gpu.low_precision.get("fp8", 1.0)
    waiting = 1 - bubble_fraction(parallel.pp_size, microbatches(config, load, dp))
    length = load.prompt_tokens + load.response_tokens
    forward = load.tokens * flops_per_token(arch, length) / (speed * waiting)
    again = {"none": 0.0, "selective": feed_forward_fraction(arch, length), "full": 1.0}[config.train.recompute]
    critic = float(needs_critic(config.algorithm))
    return StepTime(
        generate=load.sequences * load.response_tokens / sum(rates),
        old_logprobs=0.0 if config.scores_in_update else forward,
        ref_logprobs=forward if config.algorithm.kl.coef > 0 else 0.0,
        values=critic * forward,
        critic_update=critic * (3 + again) * forward,
        update=(3 + again) * forward,
        weight_sync=sync_seconds(config, arch, gpu),
        beside=config.rollout.async_steps > 0 and config.rollout.placement == "separate",
    )


def sync_bytes(config: Config, arch: Architecture) -> float:
    """Bytes that one engine receives: all weights, in the trainer's precision (engines quantize what arrives)."""
    return model_parameters(arch) * (4 if config.model.precision == "fp32" else 2)


def sync_seconds(config: Config, arch: Architecture, gpu: Gpu) -> float:
    """Colocated: a copy within the GPU's memory of each engine GPU's share; separate: over the network, into each."""
    size = sync_bytes(config, arch)
    if config.rollout.placement == "colocated":
        return 2 * size / config.rollout.tp_size / gpu.bandwidth
    return size / gpu.network  # a broadcast: every engine GPU reads the whole stream
