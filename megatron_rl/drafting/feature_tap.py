"""Taps the policy's hidden states in the pass that computes old log-probs, for the drafter to learn from.

    windows = plan_windows(batch, step, window=256, tokens=8192, seed=0)
    with tap.recording(batch, windows):
        policy.logprobs(batch)
    rows = tap.take()

Hooks exist only while recording. They copy the rows of a bounded sample of windows to the host, on every pipeline
stage those depths that it owns. Afterwards the windows of a model replica are dealt to its ranks in turn: one exchange
brings the depths of a window together on the rank that will train on it.
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from drafter.eagle.packed_rows import PackedFeatures
from megatron_rl.trainer.batch import Batch, Microbatch
from megatron_rl.trainer.pipeline_model import PipelineModel

FINAL = -1
"""The depth after the final norm, beside the numbers of `HeadConfig.aux_layers`."""
HELD_OUT_EVERY = 8


@dataclass(frozen=True)
class Window:
    """A stretch of one sequence of a batch."""

    sequence: int
    start: int
    stop: int
    """Tokens of prompt and response, from `start` to before `stop`."""
    held_out: bool
    """Never trained on: a drafter is scored with it."""


def plan_windows(batch: Batch, step: int, window: int, tokens: int, seed: int) -> list[Window]:
    """Choose what to tap: whole sequences up to `window` tokens, a random stretch with response tokens of longer ones.

    Sequences come in an order drawn from (seed, step), the same on every rank, until `tokens` are planned. All samples
    of every eighth prompt (others in every step) are held out, up to an eighth of the tokens.

    Args:
        batch: its sequences with fewer than two response tokens have nothing to draft, and are left out.
        step: of the run; makes the choice differ from step to step.
        window: longest stretch, in tokens.
        tokens: most tokens in all.
        seed: of the run.
    """
    chance = random.Random(f"{seed}/{step}")
    held_out = _held_out_sequences(batch, step)
    left = {True: tokens // HELD_OUT_EVERY, False: tokens - tokens // HELD_OUT_EVERY}
    planned = []
    for index in chance.sample(range(len(batch.prompts)), len(batch.prompts)):
        length, prompt = batch.sequence_length(index), len(batch.prompts[index])
        # Half of the stretch may be prompt: it is what the first drafts see.
        start = chance.randint(max(min(prompt, length - 2) - window // 2, 0), length - window) if length > window else 0
        size = min(length, window)
        kind = index in held_out
        if length - prompt >= 2 and size <= left[kind]:
            left[kind] -= size
            planned.append(Window(index, start, start + size, kind))
    return planned


def _held_out_sequences(batch: Batch, step: int) -> set[int]:
    numbers: dict[tuple[int, ...], int] = {}
    of_sequence = [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in batch.prompts]
    if len(numbers) == 1:  # samples of one prompt: some of them, then
        of_sequence = list(range(len(batch.prompts)))
    period = min(HELD_OUT_EVERY, max(of_sequence) + 1)
    return {index for index, number in enumerate(of_sequence) if number % period == step % period}


class FeatureTap:
    """Records hidden states of one policy. Built, used and read on all ranks together."""

    def __init__(self, policy: PipelineModel, aux_layers: tuple[int, ...]) -> None:
        """Record nothing yet.

        Args:
            policy: whose hidden states they are.
            aux_layers: depths to record beside the final one, as `HeadConfig.aux_layers` numbers them.
        """
        self._policy = policy
        self._parts = (*aux_layers, FINAL)
        self._dtype = policy.model.config.params_dtype
        self._group = _replica_group()
        stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
        self._stages: list[tuple[int, int]] = [(0, 0)] * self._group.size()
        torch.distributed.all_gather_object(self._stages, stage, group=self._group)
        self._batch: Batch | None = None
        self._planned: dict[int, Window] = {}
        self._rows: Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        self._seen: list[Window] = []
        self._taken: dict[int, list[Tensor]] = {part: [] for part in self._parts}

    @contextlib.contextmanager
    def recording(self, batch: Batch, windows: list[Window]) -> Iterator[None]:
        """Record `windows` (one at most of each sequence) in one pass of the policy over `batch`."""
        self._forget()
        self._batch, self._planned = batch, {window.sequence: window for window in windows}
        hooks = [module.register_forward_hook(self._hook(part)) for part, module in self._modules()]
        try:
            with self._policy.observing_microbatches(self._begin_microbatch):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def take(self) -> list[tuple[Window, PackedFeatures]]:
        """What falls to this rank of the last recording: each window as a row of one sequence, on the CPU.

        Hidden states have the dtype of the pass. A collective operation of the model replica.
        """
        own = {part: torch.cat(taken) for part, taken in self._taken.items() if taken}
        if self._group.size() > 1:
            own = self._exchange(own)
        rows, first = [], 0
        for window in self._dealt(self._group.rank()):
            stop = first + window.stop - window.start
            rows.append((window, self._assemble(window, {part: own[part][first:stop] for part in self._parts})))
            first = stop
        self._forget()
        return rows

    def _modules(self) -> list[tuple[int, torch.nn.Module]]:
        """(depth, the module of this stage whose output it is)."""
        model = self._policy.model
        own: dict[int, torch.nn.Module] = {layer.layer_number: layer for layer in model.decoder.layers}
        if model.pre_process:
            own[0] = model.embedding
        if model.post_process:
            own[FINAL] = model.decoder.final_layernorm
        return [(part, own[part]) for part in self._parts if part in own]

    def _begin_microbatch(self, microbatch: Microbatch) -> None:
        assert self._batch is not None
        positions, first = [], 0
        for sequence in microbatch.sequences:
            window = self._planned.get(sequence)
            if window is not None:
                self._seen.append(window)
                positions.append(torch.arange(first + window.start, first + window.stop))
            first += self._batch.sequence_length(sequence)
        self._rows = torch.cat(positions).to(microbatch.input_ids.device) if positions else None

    def _hook(self, part: int) -> Any:
        def record(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if self._rows is None:
                return
            hidden = output[0] if isinstance(output, tuple) else output
            if self._policy.config.parallel.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
            self._taken[part].append(hidden[:, 0].index_select(0, self._rows).to("cpu", self._dtype))

        return record

    def _dealt(self, rank: int) -> list[Window]:
        return self._seen[rank :: self._group.size()]

    def _source(self, part: int, number: int) -> int:
        """The rank of the replica that sends this depth of the window seen as number `number`."""
        shard = self._policy.config.parallel
        per_stage = self._policy.arch.layers // shard.pp_size
        stage = shard.pp_size - 1 if part == FINAL else max(part - 1, 0) // per_stage
        return self._stages.index((number // self._group.size() % shard.tp_size, stage))

    def _exchange(self, own: dict[int, Tensor]) -> dict[int, Tensor]:
        """All depths of the windows dealt to this rank, [tokens, hidden] each; sizes follow from the plan alone."""
        size, me = self._group.size(), self._group.rank()
        width = self._policy.arch.hidden_size
        ends = torch.tensor([0] + [window.stop - window.start for window in self._seen]).cumsum(0).tolist()

        def parcel(sender: int, receiver: int) -> Iterator[tuple[int, int, int]]:
            for number in range(receiver, len(self._seen), size):
                for part in self._parts:
                    if self._source(part, number) == sender:
                        yield part, ends[number], ends[number + 1]

        sent = [[own[part][start:stop] for part, start, stop in parcel(me, to)] for to in range(size)]
        counts = [sum(stop - start for _, start, stop in parcel(rank, me)) for rank in range(size)]
        outgoing = torch.cat([torch.empty(0, width, dtype=self._dtype), *(rows for to in sent for rows in to)])
        incoming = torch.empty(sum(counts), width, dtype=self._dtype)
        torch.distributed.all_to_all_single(
            _bytes(incoming),
            _bytes(outgoing),
            [count * width * self._dtype.itemsize for count in counts],
            [sum(map(len, to)) * width * self._dtype.itemsize for to in sent],
            group=self._group,
        )
        found: dict[int, list[tuple[int, Tensor]]] = {part: [] for part in self._parts}
        first = 0
        for rank in range(size):
            for part, start, stop in parcel(rank, me):
                found[part].append((start, incoming[first : first + stop - start]))
                first += stop - start
        ordered = {part: sorted(rows, key=lambda item: item[0]) for part, rows in found.items()}
        return {part: torch.cat([rows for _, rows in items]) for part, items in ordered.items() if items}

    def _assemble(self, window: Window, parts: dict[int, Tensor]) -> PackedFeatures:
        assert self._batch is not None
        prompt, response = self._batch.prompts[window.sequence], self._batch.responses[window.sequence]
        # Copies: a row that is kept must not keep its micro-batch.
        aux = torch.cat([parts[part] for part in self._parts[:-1]], dim=-1) if len(self._parts) > 1 else None
        final = parts[FINAL].clone()
        return PackedFeatures(
            token_ids=torch.tensor((prompt + response)[window.start : window.stop]),
            hidden_states=final if aux is None else aux,
            final_hidden=final,
            response_mask=torch.arange(window.start, window.stop) >= len(prompt),
            cu_seqlens=torch.tensor([0, window.stop - window.start], dtype=torch.int32),
        )


def _bytes(values: Tensor) -> UInt8[Tensor, "bytes"]:
    return values.view(-1).view(torch.uint8)


def _replica_group() -> torch.distributed.ProcessGroup:
    """A gloo group over this rank's model replica; made by all ranks together."""
    ranks = torch.distributed.get_process_group_ranks(parallel_state.get_model_parallel_group())
    gathered: list[list[int]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, ranks)
    replicas = sorted({tuple(replica) for replica in gathered})
    group, _ = torch.distributed.new_subgroups_by_enumeration([list(replica) for replica in replicas], backend="gloo")
    assert group is not None
    return group
