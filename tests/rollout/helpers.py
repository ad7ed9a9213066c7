"""Configurations and requests for the tests of engines and fleets."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from megatron_rl.config import Config
from rollout.engine.engine import RolloutEngine
from rollout.engine.engine_arguments import EngineEnvironment, engine_arguments
from rollout.fleet.engine_actor import engine_variables
from rollout.fleet.fleet import RolloutFleet
from rollout.fleet.local_ray import start_ray
from rollout.types import RolloutRequest
from tests.rollout.tiny_models import char_tokenizer

VOCAB_LIMIT, EOS = len(char_tokenizer()), char_tokenizer().eos_token_id


def make_config(folder: Path, model: Path, **rollout: object) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(model), "precision": "fp32"},
            "data": {"max_prompt_tokens": 64},
            "rollout": {"max_tokens": 64, "max_restarts": 2, **rollout},
            "run_dir": str(folder / "run"),
        }
    )


def make_environment(
    dtype: str = "float32", vocab_limit: int = VOCAB_LIMIT, end_ids: tuple[int, ...] = (EOS,), **env: str
) -> EngineEnvironment:
    variables = {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "MEGATRON_RL_DISABLE_AMX": "1",
    }
    return EngineEnvironment(
        env=variables | env,
        gpus=0,
        dtype=dtype,
        weight_sync="shm",
        vocab_limit=vocab_limit,
        end_ids=end_ids,
        vllm={"enforce_eager": True, "max_num_seqs": 32},
    )


def make_requests(
    prompts: int, samples: int = 1, max_tokens: int = 24, temperature: float = 1.0, seed: int = 0
) -> list[RolloutRequest]:
    """Prompts of 8 and more tokens; the seed of a request depends on its key and `seed` alone."""
    return [
        RolloutRequest(
            prompt_id=f"p{prompt}",
            sample_index=sample,
            epoch=0,
            seed=(seed * 1000 + prompt) * 1000 + sample,
            prompt_ids=[4 + (3 * prompt + i) % 60 for i in range(8 + prompt % 5)],
            max_tokens=max_tokens,
            temperature=temperature,
        )
        for prompt in range(prompts)
        for sample in range(samples)
    ]


def tokens_by_key(fleet: RolloutFleet, requests: list[RolloutRequest]) -> dict[tuple[str, int], list[int]]:
    return {(r.prompt_id, r.sample_index): r.token_ids for r in fleet.generate(requests)}


class OpenEngine(RolloutEngine):
    """An engine whose insides tests can reach."""

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self, *arguments)


@contextmanager
def open_engines(arguments: list[tuple], **env: str) -> Iterator[list[Any]]:
    """Ray actors of `OpenEngine`, started side by side."""
    started_ray = not ray.is_initialized()
    if started_ray:
        start_ray()
    options = {"runtime_env": {"env_vars": engine_variables(make_environment(**env))}}
    actors = [ray.remote(OpenEngine).options(num_cpus=0, **options).remote(*each) for each in arguments]
    ray.get([actor.start.remote() for actor in actors])
    yield actors
    ray.wait([actor.stop.remote() for actor in actors], num_returns=len(actors), timeout=10)
    for actor in actors:
        ray.kill(actor)
    if started_ray:
        ray.shutdown()


def open_arguments(
    folder: Path, model: Path, vllm: dict | None = None, drafter_path: str | None = None, **rollout: Any
) -> tuple:
    """Arguments of an engine for `open_engines`; `vllm` options go to vLLM as they are, the reserved ones too."""
    config = make_config(folder, model, **rollout)
    arguments = engine_arguments(config, make_environment(), str(model), drafter_path)
    arguments |= {"load_format": "auto"} | (vllm or {})
    rollout_settings = config.rollout
    coupled, sampling = rollout_settings.sampler == "coupled", rollout_settings.sampling
    return arguments, coupled, sampling, rollout_settings.precisions[0], (EOS,)


def generate(actor: Any, requests: list) -> list:
    """Rollouts in the order of the requests."""
    by_key = {(r.prompt_id, r.sample_index): r for r in ray.get(actor.generate_timed.remote(requests)).rollouts}
    return [by_key[request.prompt_id, request.sample_index] for request in requests]
