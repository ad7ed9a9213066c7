"""The head computes what stock vLLM computes when it drafts with the saved folder, token for token in float32."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from drafter.eagle.draft_loss import LossOptions
from drafter.eagle.head import EagleHead, HeadConfig
from drafter.eagle.head_files import load_head, save_head
from drafter.eagle.vocabulary import choose_vocabulary
from tests.drafter.policies import greedy_drafts, model_features, model_weights, pack, train
from tests.rollout.tiny_models import make_model

K = 4
NEW_TOKENS = 40
PROMPTS = [[4 + (3 * prompt + position) % 60 for position in range(8 + prompt)] for prompt in range(4)]
CASES = {"eagle3": ("eagle3", 128), "eagle3-reduced": ("eagle3", 70), "eagle": ("eagle", 128)}
STOCK_VLLM = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_PLUGINS": "",
    "CUDA_VISIBLE_DEVICES": "",
}


def make_head(model: Any, config: HeadConfig) -> EagleHead:
    """A head with a little skill on half of the prompts: some drafts are then accepted, others rejected."""
    texts = [
        model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        for prompt in PROMPTS
    ]
    counts = torch.bincount(torch.tensor(sum(texts, [])), minlength=config.vocab_size)
    reduced = config.draft_vocab_size < config.vocab_size
    torch.manual_seed(0)
    head = EagleHead(config, choose_vocabulary(counts, config.draft_vocab_size, always=[1]) if reduced else None)
    for norm in (parameter for name, parameter in head.named_parameters() if "norm" in name):
        norm.data.uniform_(0.5, 1.5)
    row = pack([model_features(model, text, 8, config) for text in texts[:2]])
    train(head, lambda step: row, model_weights(model), 30, LossOptions(steps=K))
    return head


def run_vllm(folder: Path, jobs: list[dict[str, Any]]) -> None:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.drafter.eagle.vllm_drafts", str(file)]
    done = subprocess.run(command, env=os.environ | STOCK_VLLM, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_vllm_drafts_what_the_head_proposes(tmp_path: Path) -> None:
    # An angle base and an epsilon of their own, so that a value lost on the way to vLLM shows.
    path = make_model(
        tmp_path / "model", num_hidden_layers=4, tie_word_embeddings=False, rope_theta=3000.0, rms_norm_eps=1e-3
    )
    hf = json.loads((path / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    jobs = []
    for name, (kind, draft_vocab) in CASES.items():
        config = HeadConfig.for_policy(hf, kind, draft_vocab)
        assert (config.rope["rope_theta"], config.norm_eps) == (3000.0, 1e-3)
        save_head(make_head(model, config), tmp_path / name)
        files = {"model": str(path), "head": str(tmp_path / name), "out": str(tmp_path / f"{name}.json")}
        jobs.append({"method": kind, "k": K, "prompts": PROMPTS, "max_tokens": NEW_TOKENS, **files})
    run_vllm(tmp_path, jobs)
    for name in CASES:
        compare(name, load_head(tmp_path / name), model, json.loads((tmp_path / f"{name}.json").read_text()))


def compare(name: str, head: EagleHead, model: Any, results: list[dict[str, Any]]) -> None:
    policy = model_weights(model)
    verified = accepted = 0
    for result in results:
        tokens = result["tokens"]
        expected = greedy_drafts(head, model_features(model, tokens, 8, head.config), policy, K)
        for proposal in result["proposals"]:
            anchor = proposal["anchor"]
            if anchor + 2 >= len(tokens):
                continue
            assert proposal["newest"] == tokens[anchor + 1]
            assert proposal["drafts"] == expected[anchor].tolist(), f"{name}: anchor {anchor} of {tokens}"
            verified += 1
            accepted += proposal["drafts"][0] == tokens[anchor + 2]
    assert verified > 60, name
    assert 0.1 < accepted / verified < 0.9, name
