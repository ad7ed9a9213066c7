"""A vLLM of somebody else: reads a list of actions, prints what each of them gave, as JSON. Run by test_drop_in.py.

Actions: `generate`; `reload FOLDER` by vLLM's reload_weights; `transfer FOLDER` by its weight transfer; `load FOLDER`
by the model's load_weights alone; `spoil`, a wrong weight in one layer; `check`, FLASHRL_TEST_RELOAD's check once more.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm import LLM, EngineArgs, SamplingParams
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

from rollout.weight_transfer.connection import connect, segment_name
from rollout.weight_transfer.shm import register_shm_transfer
from tests.rollout.weight_transfer.test_weight_transfer import StateDictSource

PROMPTS = [[4 + (3 * prompt + i) % 60 for i in range(8 + prompt)] for prompt in range(4)]


class Client:
    """vLLM's `VLLMWeightSyncClient` on an engine in this process."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(weight_version)


def main(model: str, *actions: str) -> None:
    register_shm_transfer()
    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        weight_transfer_config={"backend": "shm"},
    )
    results = []
    for action in actions:
        name, _, argument = action.partition(" ")
        try:
            results.append(perform(llm, name, argument))
        except Exception as error:
            results.append(f"{type(error).__name__}: {error}")
    changed = hasattr(EngineArgs.create_engine_config, "__wrapped__") or "megatron_rl" in QUANTIZATION_METHODS
    print(json.dumps({"results": results, "changed": changed}))


def perform(llm: LLM, name: str, argument: str) -> Any:
    if name == "generate":
        sampling = SamplingParams(temperature=0.7, top_k=5, max_tokens=12, seed=1, logprobs=0, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
        return [
            [output.prompt_token_ids, output.outputs[0].token_ids, logprobs_of(output.outputs[0])] for output in outputs
        ]
    if name == "reload":
        llm.collective_rpc("reload_weights", kwargs={"weights_path": argument})
    elif name == "transfer":
        source = StateDictSource(load_file(Path(argument) / "model.safetensors"))
        options = {"source": source, "barrier": lambda: None, "segment": segment_name(argument), "workers": 1}
        sync = connect("shm", rank=0, client=Client(llm), **options)
        sync.sync()
        sync.shutdown()
    elif name == "load":
        weights = load_file(Path(argument) / "model.safetensors")
        llm.apply_model(lambda model: model.load_weights(weights.items()) and None)
    elif name == "spoil":
        llm.apply_model(spoil)
    elif name == "check":
        from rollout.engine.flashrl import check_reload

        check_reload(llm.llm_engine.model_executor.driver_worker.worker)
    return None


def spoil(model: torch.nn.Module) -> None:
    model.get_parameter("model.layers.1.mlp.gate_up_proj.weight_scale").data[0] += 1


def logprobs_of(completion: Any) -> list[float]:
    return [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
