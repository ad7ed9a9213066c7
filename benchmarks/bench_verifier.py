"""The verifier beside vLLM's own sampling and verification, and beside the mere reading of the logits.

    python benchmarks/bench_verifier.py [--quick] [--json FILE]

Float32 logits at temperature 1. `vLLM` is its sampler (no drafts) or rejection sampler (drafts), with the log-probs of
the sampled tokens; its CPU build leaves the temperatures of drafts uninitialised, which is repaired here. `amax` is one
`logits.amax(-1)`. `all` verifies drafts that are all right, so that every row is read; `early exit` has 70 % of them
right, and requests end at the first wrong one. The ratios are of 32 requests x 5 rows with a vocabulary of
151,936: `verifier_vs_vllm` = vLLM / all, `amax_multiple` = all / amax, `early_exit_multiple` = early exit / amax.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from torch import Tensor

from _common import finish, measure, parse_arguments
from rollout.sampling.verify import verify_tokens

REFERENCE = (151_936, 32, 4)  # vocabulary, requests, drafts per request
QUICK = [REFERENCE, (151_936, 1, 0), (151_936, 1, 4), (32_000, 32, 4)]
FULL = [
    (vocab, requests, drafts)
    for vocab in (32_000, 151_936, 256_000)
    for requests in (1, 8, 32, 64)
    for drafts in (0, 1, 4, 16)
    if vocab * requests * (drafts + 1) <= 2**27  # 512 MiB of logits; vLLM makes several copies
]


@dataclass(frozen=True)
class Workload:
    """One batch of logits, and the two sets of drafts."""

    logits: Tensor  # [rows, vocab]
    cu_rows: Tensor
    seeds: Tensor
    positions: Tensor
    right: Tensor  # [requests, drafts]: what will be sampled
    mixed: Tensor  # the same with 30 % replaced by another token

    def verify(self, drafts: Tensor) -> Any:
        """Run the operator."""
        temperature = torch.ones(len(self.seeds))
        flat = drafts.flatten()
        return verify_tokens(
            self.logits, self.cu_rows, flat, temperature, self.seeds, self.positions, drafts.shape[1] + 1
        )


def make_workload(vocab: int, requests: int, drafts: int) -> Workload:
    """Random logits, about as peaked as those of a language model."""
    generator = torch.Generator().manual_seed(0)
    rows = requests * (drafts + 1)
    logits = torch.empty(rows, vocab).normal_(0, 2.5, generator=generator)
    peaks = torch.randint(0, vocab, (rows, 8), generator=generator)
    logits.scatter_(1, peaks, torch.linspace(22, 15, 8).expand(rows, 8))
    cu_rows = torch.arange(0, rows + 1, drafts + 1, dtype=torch.int32)
    seeds, positions = torch.arange(requests), torch.arange(requests) * 7
    each = torch.arange(rows + 1, dtype=torch.int32)
    row_positions = positions.repeat_interleave(drafts + 1) + torch.arange(rows) % (drafts + 1)
    sampled = verify_tokens(
        logits, each, each[:0], torch.ones(rows), seeds.repeat_interleave(drafts + 1), row_positions, max_rows=1
    )
    right = sampled.tokens.view(requests, drafts + 1)[:, :drafts].contiguous()
    wrong = torch.rand(right.shape, generator=generator) < 0.3
    mixed = torch.where(wrong, (right + 1) % vocab, right)
    return Workload(logits, cu_rows, seeds, positions, right, mixed)


def vllm_sampling(work: Workload) -> Callable[[], Any]:
    """vLLM's way to the same result, as its model runner calls it."""
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    requests, drafts = work.right.shape
    metadata = SamplingMetadata(
        temperature=torch.ones(requests),
        all_greedy=False,
        all_random=True,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=0,  # of the sampled token alone
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.zeros(requests),
        presence_penalties=torch.zeros(requests),
        repetition_penalties=torch.ones(requests),
        output_token_ids=[[] for _ in range(requests)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    sampler = Sampler("processed_logprobs")
    if drafts == 0:
        return lambda: sampler(work.logits, metadata)
    rows = torch.arange(len(work.logits), dtype=torch.int32).view(requests, drafts + 1)
    spec = replace(
        SpecDecodeMetadata.make_dummy(work.right.tolist(), torch.device("cpu")),
        target_logits_indices=rows[:, :-1].flatten(),
        bonus_logits_indices=rows[:, -1].contiguous(),
    )
    verifier = rejection_sampler.RejectionSampler(sampler)
    return lambda: verifier(spec, None, work.logits, metadata)


def repair_vllm() -> None:
    """Load vLLM's CPU kernels and replace the function that leaves its output uninitialised there."""
    import vllm._C  # noqa: F401
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.sample import rejection_sampler

    def expand_batch_to_tokens(
        x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Tensor:
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1)).long()
        return torch.where(x == replace_from, replace_to, x).repeat_interleave(counts)

    CpuPlatform.register_triton_kernel_overrides()
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


@torch.inference_mode()
def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(__doc__)
    repair_vllm()
    rows, ratios = [], {}
    for vocab, requests, drafts in QUICK if arguments.quick else FULL:
        work = make_workload(vocab, requests, drafts)
        emitted = work.verify(work.right).num_emitted
        assert (emitted == drafts + 1).all(), "the drafts were meant to be right"
        cases = {
            "amax": lambda work=work: work.logits.amax(-1),
            "all": lambda work=work: work.verify(work.right),
            "early exit": lambda work=work: work.verify(work.mixed),
            "vLLM": vllm_sampling(work),
        }
        seconds = measure(cases, repetitions=7 if arguments.quick else 11)
        row: dict[str, Any] = {"vocabulary": vocab, "requests": requests, "drafts": drafts}
        row |= {f"{name} [ms]": 1e3 * seconds[name] for name in cases}
        found = {
            "verifier_vs_vllm": seconds["vLLM"] / seconds["all"],
            "amax_multiple": seconds["all"] / seconds["amax"],
            "early_exit_multiple": seconds["early exit"] / seconds["amax"],
        }
        rows.append(row | {"vLLM / all": found["verifier_vs_vllm"], "all / amax": found["amax_multiple"]})
        if (vocab, requests, drafts) == REFERENCE:
            ratios = found
    finish(arguments, ratios, rows)


if __name__ == "__main__":
    main()
