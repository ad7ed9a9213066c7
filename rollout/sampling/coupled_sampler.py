"""The sampler of the engines: how the rows of logits of one step become tokens.

A request takes part by carrying its seed, `SamplingParams(extra_args={"seed": 123})`. (vLLM's own `seed` keeps a
generator's state per request, which a restart loses.) The steps, in order:

1. Read the options and the seed of each request (`request_options`, `seeds_of`). Without seeds vLLM's own sampler runs.
2. Refuse options that this sampler lacks (`logit_constraints.refuse_unsupported`).
3. Lay out the rows (`_Rows`): a request with k draft tokens owns k + 1 consecutive rows of logits. The position of a
   row is that of its input token, and decides its noise together with the seed.
4. Read the temperatures; those below 1e-5 are greedy.
5. Where a request needs it, constrain the logits (`logit_constraints.constrain`), in vLLM's order: allowed ids, bad
   words, bias, minimum length, penalties, temperature, min-p, top-k, top-p. Draft rows are treated like all others.
6. Verify (`verify.verify_tokens`): per row, sample with the noise of seed and position; emit as long as the samples
   equal the drafts, and the first one that differs. Requests that keep an earlier response go by the lenient rule
   (`lenient.verify_leniently`).
7. Keep the noise of the positions that follow (`DraftNoise`), with which a draft model samples the next drafts.
8. Return tokens and log-probabilities, and tell the scheduler which tokens were kept leniently.
"""

import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata

from rollout.sampling.lenient import LenientDraft, verify_leniently
from rollout.sampling.logit_constraints import (
    BatchRows,
    RequestOptions,
    constrain,
    is_greedy,
    needs_constraints,
    refuse_unsupported,
)
from rollout.sampling.verify import verify_tokens
from rollout.types import SEED_KEY

PROFILE = "MEGATRON_RL_PROFILE"
DRAFT_NOISE = "_megatron_rl_draft_noise"
"""Attribute of a proposer: the `DraftNoise` of its next drafts, None where vLLM samples them."""
LENIENT_DRAFTS = "_megatron_rl_lenient_drafts"
"""Attribute of a model runner: request id -> the `LenientDraft` of this step."""


class VerifyClock:
    """Seconds spent in verification, measured with `MEGATRON_RL_PROFILE=1` only: measuring makes a GPU wait."""

    def __init__(self) -> None:
        self.enabled = os.environ.get(PROFILE) == "1"
        self.seconds = 0.0
        self._start = 0.0

    def _now(self) -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    def __enter__(self) -> None:
        if self.enabled:
            self._start = self._now()

    def __exit__(self, *error: object) -> None:
        if self.enabled:
            self.seconds += self._now() - self._start


verify_clock = VerifyClock()


class DraftNoise:
    """The noise of the drafts that follow a sampling step: that of the positions where each request continues."""

    def __init__(
        self,
        seeds: Int[Tensor, "batch"],
        temperature: Float[Tensor, "batch"],
        positions: Int[Tensor, "batch"],
        vocab_limit: int | None,
    ) -> None:
        """
        Args:
            seeds: int64.
            temperature: float32.
            positions: int64, of the input token of each request's next row.
            vocab_limit: token ids from this one on are never drafted.
        """
        self._seeds, self._temperature, self._positions = seeds, temperature, positions
        self._vocab_limit = vocab_limit

    def sample(self, logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, "batch"]:
        """One draft token per request, int64; the next call samples the tokens after them."""
        batch = len(logits)
        tokens, _, _ = verify_tokens(
            logits[:, : self._vocab_limit],
            torch.arange(batch + 1, dtype=torch.int32, device=logits.device),
            torch.empty(0, dtype=torch.int32, device=logits.device),
            self._temperature[:batch],
            self._seeds[:batch],
            self._positions[:batch],
            1,
        )
        self._positions = self._positions + 1
        return tokens[:, 0].long()


def set_draft_noise(runner: Any, noise: DraftNoise | None) -> None:
    """Give the model runner's proposer, if it has one, the noise of its next drafts."""
    if (proposer := getattr(runner, "drafter", None)) is not None:
        setattr(proposer, DRAFT_NOISE, noise)


def request_options(runner: Any) -> list[RequestOptions]:
    """The options of each request in a model runner's batch."""
    states = [runner.requests[request] for request in runner.input_batch.req_ids]
    return [RequestOptions(state.sampling_params, len(state.output_token_ids)) for state in states]


def seeds_of(options: list[RequestOptions], device: torch.device) -> Int[Tensor, "batch"] | None:
    """The seeds of the batch's requests, int64, or None when no request has one.

    Raises:
        ValueError: some requests have a seed and others have none.
    """
    seeds = [(request.parameters.extra_args or {}).get(SEED_KEY) for request in options]
    if None not in seeds:
        return torch.tensor(seeds, dtype=torch.int64, device=device)
    if any(seed is not None for seed in seeds):
        raise ValueError(f"Requests with and without extra_args[{SEED_KEY!r}] cannot run in one engine at a time.")
    return None


@dataclass(frozen=True)
class _Rows:
    """Which rows of logits belong to which request."""

    cu_rows: Int[Tensor, "batch+1"]
    """int32: the first row of each request, and the number of rows at the end."""
    draft_ids: Int[Tensor, "drafts"]
    """int32: the drafts of all requests, one after the other."""
    positions: Int[Tensor, "batch"]
    """int64: of the input token of each request's first row."""
    max_rows: int
    """Most rows of a request."""
    counts: list[int]
    """Draft tokens of each request."""

    @classmethod
    def lay_out(cls, runner: Any, batch: int, spec_decode_metadata: Any, device: torch.device) -> "_Rows":
        """From vLLM's metadata of the drafts, None in a step without drafts."""
        cu_rows = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        if spec_decode_metadata is None:
            torch.arange(1, batch + 1, out=cu_rows[1:])
            last_tokens = runner.query_start_loc.gpu[1 : batch + 1].long() - 1
            no_drafts = torch.empty(0, dtype=torch.int32, device=device)
            return cls(cu_rows, no_drafts, runner.positions[last_tokens].long(), 1, [0] * batch)
        cu_rows[1:] = spec_decode_metadata.cu_num_sampled_tokens
        first_rows = spec_decode_metadata.logits_indices[cu_rows[:-1].long()].long()
        return cls(
            cu_rows,
            spec_decode_metadata.draft_token_ids.to(torch.int32),
            runner.positions[first_rows].long(),
            spec_decode_metadata.max_spec_len + 1,
            spec_decode_metadata.num_draft_tokens,
        )

    def drafts(self) -> list[list[int]]:
        """The draft of each request."""
        if not len(self.draft_ids):
            return [[] for _ in self.counts]
        return [part.tolist() for part in self.draft_ids.cpu().split(self.counts)]


def sample(
    runner: Any,
    logits: Float[Tensor, "rows vocab"],
    options: list[RequestOptions],
    seeds: Int[Tensor, "batch"],
    spec_decode_metadata: Any,
    vocab_limit: int | None,
) -> SamplerOutput:
    """Steps 2 to 8 of the module's docstring.

    Args:
        runner: vLLM's model runner.
        logits: of all rows, any float dtype.
        options: one per request.
        seeds: int64.
        spec_decode_metadata: vLLM's metadata of the drafts; None in a step without drafts.
        vocab_limit: token ids from this one on are never sampled.

    Returns:
        tokens [batch, max_rows], -1 after a request's last; their log-probabilities, with marks in place of the ranks.

    Raises:
        ValueError: a request has an option that coupled sampling lacks.
    """
    runner.input_batch.update_async_output_token_ids()
    metadata: SamplingMetadata = runner.input_batch.sampling_metadata
    refuse_unsupported(metadata)
    rows = _Rows.lay_out(runner, len(seeds), spec_decode_metadata, logits.device)
    temperature = sampling_temperature = _temperature(metadata, len(seeds), logits.device)
    if needs_constraints(metadata, options):
        logits = constrain(logits, metadata, options, BatchRows.of(rows.drafts(), logits.device), vocab_limit)
        sampling_temperature = torch.where(temperature == 0, 0.0, 1.0)  # the logits are already divided by it
    arguments = (
        logits[:, :vocab_limit],
        rows.cu_rows,
        rows.draft_ids,
        sampling_temperature,
        seeds,
        rows.positions,
        rows.max_rows,
    )
    lenient_drafts: dict[str, LenientDraft] = getattr(runner, LENIENT_DRAFTS, {})
    with verify_clock:
        if lenient_drafts:
            by_request = [lenient_drafts.get(request) for request in runner.input_batch.req_ids]
            (tokens, emitted, logprobs), marks = verify_leniently(by_request, *arguments, rows.counts)
        else:
            tokens, emitted, logprobs = verify_tokens(*arguments)
            marks = torch.zeros(tokens.shape, dtype=torch.int64, device=tokens.device)
    set_draft_noise(runner, DraftNoise(seeds, temperature, rows.positions + emitted, vocab_limit))
    return SamplerOutput(tokens, _logprobs_tensors(tokens, logprobs, marks))


def _temperature(metadata: SamplingMetadata, batch: int, device: torch.device) -> Float[Tensor, "batch"]:
    """float32, 0 where greedy."""
    if metadata.temperature is None:  # all requests are greedy
        return torch.zeros(batch, device=device)
    temperature = metadata.temperature[:batch].float()
    return torch.where(is_greedy(temperature), 0.0, temperature)


def _logprobs_tensors(
    tokens: Int[Tensor, "batch max_rows"],
    logprobs: Float[Tensor, "batch max_rows"],
    marks: Int[Tensor, "batch max_rows"],
) -> LogprobsTensors:
    """vLLM expects the tokens' ranks, which nothing here reads: their field carries the marks to the scheduler."""
    return LogprobsTensors(tokens.reshape(-1, 1).clamp(min=0), logprobs.reshape(-1, 1), marks.reshape(-1))
