"""Runs in a process of its own: stock vLLM drafts greedily, and what it proposed is written down.

`python -m tests.drafter.eagle.vllm_drafts JOBS.json` with a list of {"model", "head", "method", "k", "prompts",
"max_tokens", "out"}; one engine after the other, in one process, because importing vLLM takes longer than drafting.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

torch.cpu._is_amx_tile_supported = lambda: False

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer  # noqa: E402

stock_propose = SpecDecodeBaseProposer.propose
proposals: list[dict] = []


def propose(self: Any, **arguments: Any) -> torch.Tensor:
    drafts = stock_propose(self, **arguments)
    positions, last = arguments["target_positions"], arguments["token_indices_to_sample"]
    anchor = int(positions[-1 if last is None else int(last[0])])
    newest = int(arguments["next_token_ids"][0])
    proposals.append({"anchor": anchor, "newest": newest, "drafts": drafts[0].tolist()})
    return drafts


def run(job: dict) -> None:
    llm = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=1,
        max_model_len=256,
        async_scheduling=False,
        enable_prefix_caching=False,
        speculative_config={"method": job["method"], "model": job["head"], "num_speculative_tokens": job["k"]},
    )
    results = []
    for prompt in job["prompts"]:
        proposals.clear()
        sampling = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
        (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        results.append({"tokens": prompt + list(output.outputs[0].token_ids), "proposals": list(proposals)})
    Path(job["out"]).write_text(json.dumps(results))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    SpecDecodeBaseProposer.propose = propose
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
        cleanup_dist_env_and_memory()
