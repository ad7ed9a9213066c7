"""What this package adds to vLLM's workers: weight updates of an EAGLE head, and checksums of the weights in use."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rollout.quantization.int8 import Rounding
from rollout.quantization.online import weight_rounding
from rollout.sampling.coupled_sampler import verify_clock
from rollout.speculation.head_weights import PackedHead, unpack_head
from rollout.weight_transfer.checksum import PartialChecksums, partial_checksum

WeightPart = tuple[str, tuple[slice, ...], tuple[int, ...], Tensor]
"""HF name, index of this worker's part in the full HF tensor, shape of the full tensor, the part."""
Projection = tuple[str, slice, slice, int]
"""A Hugging Face projection in a (possibly fused) layer: name, its rows there, in the full tensor, and their number."""

_IDENTITY_ROWS = 256


class WorkerExtension:
    """Mixed into vLLM's worker class (`worker_extension_cls`); its methods are called through `collective_rpc`."""

    model_runner: Any
    vllm_config: Any

    def take_verify_seconds(self) -> float:
        """Seconds that this worker spent sampling and verifying since the last call."""
        seconds = verify_clock.seconds
        verify_clock.seconds = 0.0
        return seconds

    def load_head(self, packed: PackedHead) -> None:
        """Load new weights into the EAGLE head, except for the modules that it shares with the policy."""
        head = self.model_runner.get_draft_model()
        with set_current_vllm_config(self.vllm_config), _without_shared(head, self.model_runner.get_model()):
            initialize_layerwise_reload(head)
            head.load_weights(unpack_head(packed))
            finalize_layerwise_reload(head, self.vllm_config.speculative_config.draft_model_config)

    def weight_rounding(self) -> dict[str, Rounding]:
        """What int8 did to the weights of this worker's part of each layer."""
        return weight_rounding(self.model_runner.get_model())

    @torch.inference_mode()
    def weight_checksums(self) -> PartialChecksums:
        """Checksums of this worker's part of every Hugging Face tensor.

        Raises:
            NotImplementedError: a layer does not keep its weights as they were sent (a quantized one).
        """
        checksums: PartialChecksums = {}
        for name, index, shape, part in live_parts(self.model_runner.get_model()):
            bounds = tuple(span.indices(size)[:2] for span, size in zip(index, shape, strict=True))
            checksums[name, bounds] = partial_checksum(part, index, shape)
        return checksums


@contextmanager
def _without_shared(head: torch.nn.Module, policy: torch.nn.Module) -> Iterator[None]:
    """Takes the policy's modules (the embedding, an EAGLE head's output layer) out of the head, and puts them back."""
    own_by_policy = set(policy.modules())
    shared = [
        (parent, name, child)
        for parent in head.modules()
        for name, child in parent.named_children()
        if child in own_by_policy and parent not in own_by_policy
    ]
    for parent, name, _ in shared:
        delattr(parent, name)
    try:
        yield
    finally:
        for parent, name, child in shared:
            setattr(parent, name, child)


def live_parts(model: torch.nn.Module) -> Iterator[WeightPart]:
    """All Hugging Face tensors of which `model` (a vLLM model) holds a part, read from the memory that is used."""
    fused_names: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    for prefix, module in model.named_modules():
        if isinstance(module, VocabParallelEmbedding):
            yield from _embedding_parts(prefix, module)
        elif isinstance(module, LinearBase):
            yield from _linear_parts(prefix, module, fused_names)
        elif module.__class__.__name__.endswith("Norm"):
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{prefix}.{name}", _everything(parameter.shape), tuple(parameter.shape), parameter


def live_weight(layer: Any) -> Tensor:
    """The [out, in] matrix that the layer multiplies with.

    On CPU vLLM packs weights for its kernels; the product with the identity returns them, exactly: each dot product
    has one term that is not zero.

    Raises:
        NotImplementedError: the layer is quantized.
    """
    if not isinstance(layer.quant_method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
        raise NotImplementedError("checksums of quantized layers: set rollout.verify_weights: false")
    if not hasattr(layer, "cpu_linear"):
        weight: Tensor = layer.weight
        return weight
    width: int = layer.input_size_per_partition
    columns = []
    for start in range(0, width, _IDENTITY_ROWS):
        rows = torch.zeros(min(_IDENTITY_ROWS, width - start), width, dtype=layer.params_dtype)
        rows[:, start : start + len(rows)].fill_diagonal_(1)
        # An output layer may return float32, which holds its weight exactly.
        columns.append(layer.quant_method.apply(layer, rows, None).T.to(layer.params_dtype))
    return torch.cat(columns, dim=1)


def _everything(shape: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in shape)


def _embedding_parts(prefix: str, module: VocabParallelEmbedding) -> Iterator[WeightPart]:
    shard = module.shard_indices
    index = (slice(shard.org_vocab_start_index, shard.org_vocab_end_index), slice(0, module.embedding_dim))
    # Looking a token up reads the plain table; only an output layer multiplies.
    weight = live_weight(module) if isinstance(module, ParallelLMHead) else module.weight
    part = weight[: shard.num_org_elements]  # the rest is padding
    yield f"{prefix}.weight", index, (module.org_vocab_size, module.embedding_dim), part


def _linear_parts(prefix: str, module: LinearBase, fused_names: dict[str, list[str]]) -> Iterator[WeightPart]:
    weight = live_weight(module)
    columns = slice(0, module.input_size)
    if isinstance(module, RowParallelLinear):
        size = module.input_size_per_partition
        columns = slice(module.tp_rank * size, (module.tp_rank + 1) * size)
    for name, live, rows, out_features in _projections(prefix, module, fused_names):
        yield f"{name}.weight", (rows, columns), (out_features, module.input_size), weight[live]
        if module.bias is not None:
            yield f"{name}.bias", (rows,), (out_features,), module.bias[live]


def _projections(prefix: str, module: LinearBase, fused_names: dict[str, list[str]]) -> Iterator[Projection]:
    parent, _, own_name = prefix.rpartition(".")
    names = [f"{parent}.{name}" for name in fused_names.get(own_name, [own_name])]
    if isinstance(module, QKVParallelLinear):
        kv_rank = module.tp_rank // module.num_kv_head_replicas
        sizes = [
            (module.num_heads * module.head_size, module.tp_rank, module.total_num_heads * module.head_size),
            (module.num_kv_heads * module.head_size, kv_rank, module.total_num_kv_heads * module.head_size),
            (module.num_kv_heads * module.v_head_size, kv_rank, module.total_num_kv_heads * module.v_head_size),
        ]
    elif isinstance(module, MergedColumnParallelLinear):
        sizes = [(size // module.tp_size, module.tp_rank, size) for size in module.output_sizes]
    elif isinstance(module, ColumnParallelLinear):
        sizes = [(module.output_size_per_partition, module.tp_rank, module.output_size)]
    else:
        sizes = [(module.output_size, 0, module.output_size)]
    offset = 0
    for name, (size, rank, full) in zip(names, sizes, strict=True):
        yield name, slice(offset, offset + size), slice(rank * size, (rank + 1) * size), full
        offset += size
