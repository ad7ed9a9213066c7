"""Memory of one GPU, by part, before anything is allocated. The arithmetic is explained in docs/plan.md.

All sizes are bytes. A pipeline stage is one of `parallel.pp_size`; what is said of a stage is said of one of its GPUs.
"""

from dataclasses import dataclass

from megatron_rl.algorithms import needs_critic
from megatron_rl.config import Config
from megatron_rl.models.architecture import Architecture

ENGINE_SHARE = 0.5
"""vLLM's `gpu_memory_utilization` of colocated engines, unless the user says otherwise; separate ones get 0.9."""
SEPARATE_ENGINE_SHARE = 0.9
RUNTIME_BYTES = 2 * 2**30
"""CUDA's and NCCL's own, and what the allocator cannot use: an allowance, not a measurement."""
BYTES = {"none": 2.0, "int8": 1.0, "fp8": 1.0, "fp8_channel": 1.0, "fp8_block": 1.0}


def layer_parameters(arch: Architecture, tp: int = 1) -> tuple[int, int]:
    """Parameters of a decoder layer on one of `tp` GPUs, without experts: (of linear layers' matrices, all others)."""
    queries, keys = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    matrices = arch.hidden_size * (2 * queries + 2 * keys) // tp
    others = 2 * arch.hidden_size + arch.hidden_size * arch.experts  # the router's matrix is never rounded
    if not arch.experts:
        matrices += expert_parameters(arch) // tp
    if arch.qk_norm:
        others += 2 * arch.head_dim
    if arch.qkv_bias:
        others += (queries + 2 * keys) // tp
    return matrices, others


def expert_parameters(arch: Architecture) -> int:
    """Parameters of one expert, or of the feed-forward layer of a dense model."""
    return 3 * arch.hidden_size * arch.ffn_hidden_size


def held_experts(arch: Architecture, pp: int, ep: int) -> int:
    """Parameters of the experts that a GPU holds."""
    return arch.layers // pp * (arch.experts // ep) * expert_parameters(arch)


def stage_parameters(arch: Architecture, tp: int, pp: int, stage: int) -> int:
    """Parameters that a GPU of `stage` (0 .. pp - 1) holds, without experts; padding of the vocabulary included."""
    count = sum(layer_parameters(arch, tp)) * (arch.layers // pp)
    table = arch.padded_vocab(tp) // tp * arch.hidden_size
    first, last = stage == 0, stage == pp - 1
    if first:
        count += table
    if last:
        count += arch.hidden_size  # the last norm
        if not (arch.tied and first):  # with several stages a tied output layer is a copy
            count += table
    return count


def critic_parameters(arch: Architecture, tp: int, pp: int, stage: int) -> int:
    """Parameters of the critic that a GPU of `stage` holds: its value head is in place of the output table."""
    count = stage_parameters(arch, tp, pp, stage)
    if stage < pp - 1:
        return count
    table = 0 if arch.tied and stage == 0 else arch.padded_vocab(tp) // tp * arch.hidden_size
    return count - table + arch.hidden_size


def model_parameters(arch: Architecture) -> int:
    """Parameters of the whole model."""
    return stage_parameters(arch, 1, 1, 0) + held_experts(arch, 1, 1)


def active_parameters(arch: Architecture) -> int:
    """Parameters of the whole model that work on one token."""
    return model_parameters(arch) - arch.layers * (arch.experts - arch.experts_per_token) * expert_parameters(arch)


def layer_activations(arch: Architecture, tp: int, sequence_parallel: bool, width: int, fused: bool = True) -> float:
    """Bytes that one layer keeps for its backward pass, per token; `width`: bytes of an activation.

    Follows Korthikanti et al. (arXiv 2205.05198), section 4, for layers with grouped queries, rotary positions and a
    gated feed-forward layer. `fused`: with Transformer Engine's norms and attention; otherwise with those of torch, as
    on a CPU, which keep more.
    """
    hidden = arch.hidden_size / (tp if sequence_parallel else 1)
    queries, keys = arch.heads * arch.head_dim / tp, arch.kv_heads * arch.head_dim / tp
    feed_forward = feed_forward_activations(arch, tp, hidden)
    # Projections (values are a view of them), queries and keys with their positions, output.
    attention = (queries + 2 * keys) + (queries + keys) + queries
    norms = 2 * norm_activations(hidden, width, fused)
    if not fused:
        # It unpacks all four with keys and values repeated, and keeps the tables of positions.
        attention += 4 * queries + 4 * arch.head_dim
        if arch.qk_norm:  # in float32, for bf16 also a copy of what comes in
            norms += (4 if width == 4 else 8) * (queries + keys)
    return norms + width * (attention + feed_forward)


def feed_forward_activations(arch: Architecture, tp: int, hidden: float) -> float:
    """Numbers that the feed-forward layer, or the experts of a token, keep per token; `hidden`: width of its input.

    With experts it is the mean: that of a GPU whose experts get an equal share of the tokens.
    """
    # Output of the first layer (two halves), the activated half, the other with its offset, and their product.
    inner = 5 * arch.ffn_hidden_size
    if not arch.experts:
        return inner / tp
    # Each expert has a copy of the token, and the product times the expert's weight on top.
    return (hidden + (inner + arch.ffn_hidden_size) * hidden / arch.hidden_size) * arch.experts_per_token


def norm_activations(hidden: float, width: int, fused: bool) -> float:
    """Bytes that a norm keeps per token: input and output, without fusion in float32 what it multiplies, too."""
    return 2 * width * hidden if fused else (4 + 4 + width) * hidden


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU of a trainer, without an engine beside it."""

    stage: int
    weights: float
    fp8_copies: float
    gradients: float
    optimizer: float
    reference: float
    critic: float
    activations: float
    logits: float
    runtime: float

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(size for _, size in self.parts())

    def parts(self) -> list[tuple[str, float]]:
        """(name, bytes) of every part, in the order of the class."""
        return [
            ("weights", self.weights),
            ("fp8 copies of weights", self.fp8_copies),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("reference model", self.reference),
            ("critic", self.critic),
            ("activations", self.activations),
            ("logits", self.logits),
            ("runtime", self.runtime),
        ]


def trainer_memory(
    config: Config, arch: Architecture, dp: int, microbatches: int, stage: int, fused: bool = True
) -> Memory:
    """Memory of a trainer's GPU of `stage`, without an engine.

    Args:
        config: the experiment.
        arch: shape of the model.
        dp: data-parallel replicas.
        microbatches: of one optimizer step and replica; a stage holds no more of them at once.
        stage: 0 .. pp_size - 1.
        fused: see `layer_activations`.
    """
    tp, pp = config.parallel.tp_size, config.parallel.pp_size
    width = 4 if config.model.precision == "fp32" else 2
    cp, ep = config.parallel.cp_size, config.parallel.ep_size
    shared, experts = stage_parameters(arch, tp, pp, stage), held_experts(arch, pp, ep)
    parameters = shared + experts
    matrices, _ = layer_parameters(arch, tp)
    # Adam's two moments in float32, and a float32 master copy where the weights themselves are not; over the replicas,
    # for experts over their copies.
    adam = 8 if width == 4 else 12
    optimizer = (shared / (cp * dp) + experts * ep / (tp * cp * dp)) * adam
    critic = critic_parameters(arch, tp, pp, stage) if needs_critic(config.algorithm) else 0
    tokens = config.train.tokens_per_microbatch / cp
    layers = arch.layers // pp
    per_layer = layer_activations(arch, tp, config.parallel.sequence_parallel, width, fused)
    in_flight = min(pp - stage, microbatches)  # 1F1B
    hidden = arch.hidden_size / (tp if config.parallel.sequence_parallel else 1)
    # What a layer keeps until the backward pass reaches it, and what it computes again then, one layer at a time.
    again = {
        "none": 0.0,
        "selective": width * feed_forward_activations(arch, tp, hidden),
        "full": per_layer - width * hidden,
    }[config.train.recompute]
    activations = tokens * (in_flight * layers * (per_layer - again) + again)
    # Logits of one micro-batch and their gradient.
    logits = 2 * width * tokens * arch.padded_vocab(tp) / tp if stage == pp - 1 else 0.0
    return Memory(
        stage=stage,
        weights=width * parameters,
        # Transformer Engine keeps the rounded weights and their transposes over the micro-batches of a step.
        fp8_copies=2.0 * matrices * layers if config.model.precision == "fp8" else 0.0,
        gradients=4 * parameters,
        optimizer=optimizer,
        reference=width * parameters if config.algorithm.kl.coef > 0 else 0.0,
        critic=(width + 4 + adam / (cp * dp)) * critic,
        activations=activations,
        logits=logits,
        runtime=RUNTIME_BYTES,
    )


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of one GPU of an engine."""

    share: float
    """All that vLLM takes."""
    weights: float
    cache: float
    """For keys and values; not positive when the weights do not fit."""
    per_token: float
    """Keys and values of one token."""


def engine_memory(config: Config, arch: Architecture, gpu_bytes: float, precision: str) -> EngineMemory:
    """Memory of an engine of `rollout.tp_size` GPUs whose linear layers have `precision`."""
    rollout = config.rollout
    tp = rollout.tp_size
    default = ENGINE_SHARE if rollout.placement == "colocated" else SEPARATE_ENGINE_SHARE
    share = gpu_bytes * float(rollout.vllm.get("gpu_memory_utilization", default))
    matrices, others = layer_parameters(arch, tp)
    width = 4 if config.model.precision == "fp32" else 2
    linear = width if precision == "none" else BYTES[precision]
    tables = stage_parameters(arch, tp, 1, 0) - arch.layers * (matrices + others)
    experts = held_experts(arch, 1, 1) // tp
    weights = linear * matrices * arch.layers + width * (others * arch.layers + tables + experts)
    # Keys and values are copied where there are more GPUs than their heads.
    per_token = 2 * width * arch.layers * max(arch.kv_heads / tp, 1) * arch.head_dim
    # A tenth for activations and CUDA graphs.
    return EngineMemory(share, weights, 0.9 * share - weights, per_token)
