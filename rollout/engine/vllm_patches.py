"""The one module that changes functions of vLLM. `PATCHES` lists them; each is installed by a function named after it.

Engines of ours install the first group (`install_coupled_sampling`), engines of other frameworks the second
(`install_hooks`).
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import vllm
from jaxtyping import Int
from torch import Tensor
from vllm import EngineArgs, SamplingParams
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from rollout.sampling import coupled_sampler
from rollout.sampling.coupled_sampler import DRAFT_NOISE, LENIENT_DRAFTS, DraftNoise
from rollout.speculation import eagle
from rollout.speculation.no_drafts import NoDrafts
from rollout.speculation.speculation_settings import SETTINGS_KEY
from rollout.types import SEED_KEY

TESTED_VERSIONS = ("0.32.0",)


@dataclass(frozen=True)
class Patch:
    """One function of vLLM that is replaced."""

    why: str
    versions: tuple[str, ...] = TESTED_VERSIONS
    """Of vLLM, with which the replacement was tested."""


PATCHES = {
    "GPUModelRunner._sample": Patch(
        "Plain sampling and the verification of drafts are one call of `rollout.sampling.coupled_sampler`."
    ),
    "GPUModelRunner.execute_model": Patch(
        "A step without drafts takes the plain path, also in an engine that could draft, unless an EAGLE head drafts "
        "after it. No length is too long for the head: vLLM would hand out drafts of zeros to all requests as soon as "
        "one is near its end, although positions past the end are handled. And the scheduler's `lenient_drafts` are "
        "passed on to `_sample`."
    ),
    "GPUModelRunner.propose_draft_token_ids": Patch(
        "The EAGLE head does not run where the scheduler says so (`eagle.HEAD_IDLE`). With K = 0, vLLM's own way, it "
        "would still make its first pass, to keep its keys and values complete."
    ),
    "SpecDecodeBaseProposer._sample_draft_tokens": Patch(
        "Draft models and EAGLE heads sample with the noise of the verification, so that a draft is accepted whenever "
        "drafter and policy agree, also at temperature 1."
    ),
    "SpecDecodeBaseProposer._maybe_share_embeddings": Patch(
        "The head always reads the policy's embedding. vLLM compares values: a copy of the embedding in the head's "
        "folder would stay as it is when the policy changes."
    ),
    "SpecDecodeBaseProposer._maybe_share_lm_head": Patch(
        "The `lm_head` of an EAGLE-3 head is never the policy's. vLLM would share one that started as a copy of the "
        "policy's, so that new weights for one would overwrite the other."
    ),
    "SamplingParams._validate_spec_decode": Patch(
        "vLLM refuses min-p and logit bias beside drafts, because its own verification lacks them; ours has them."
    ),
    "rejection_sampler.expand_batch_to_tokens": Patch(
        "On CPU, for `rollout.sampler: rejection`: vLLM leaves the result uninitialised, so drafts get the wrong "
        "temperature."
    ),
    "UnquantizedFusedMoEMethod._setup_kernel": Patch(
        "On CPU vLLM packs experts for its kernel when they are loaded first, but not when they get new weights, which "
        "the kernel would then read in the wrong layout."
    ),
    "EngineArgs.create_engine_config": Patch(
        "For `rollout.engine.flashrl`: its settings are put into the arguments, which exist before plugins are loaded."
    ),
    "Worker.load_model": Patch("For `rollout.engine.flashrl`: a reload is tried after the model was loaded."),
    "Worker.reload_weights": Patch(
        "For `rollout.engine.flashrl`: an output layer is renewed after the update, which vLLM forgets on CPU."
    ),
    "Worker.finish_weight_update": Patch("For `rollout.engine.flashrl`: as for `Worker.reload_weights`."),
}
"""What is replaced -> why, and for which versions of vLLM."""

_installed: set[str] = set()


def _patch(target: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks the function that installs a patch of the table: it runs once, after the version check."""
    entry = PATCHES[target]

    def decorate(install: Callable[..., None]) -> Callable[..., None]:
        @wraps(install)
        def checked(*arguments: Any) -> None:
            if vllm.__version__.split("+")[0] not in entry.versions:
                raise RuntimeError(
                    f"This package replaces {target} of vLLM, as tested with vLLM {', '.join(entry.versions)}, but "
                    f"{vllm.__version__} is installed; install a tested version."
                )
            if target not in _installed:
                install(*arguments)
                _installed.add(target)

        return checked

    return decorate


def install_coupled_sampling(vocab_limit: int | None) -> None:
    """Install the patches for engines of ours; a second call changes nothing.

    Requests without a seed are sampled by vLLM itself, below the same limit.

    Args:
        vocab_limit: token ids from this one on are never sampled; None: all are.

    Raises:
        RuntimeError: the installed vLLM is not among the tested versions.
    """
    _patch_sample(vocab_limit)
    _patch_execute_model()
    _patch_propose_draft_token_ids()
    _patch_sample_draft_tokens()
    _patch_share_embeddings()
    _patch_share_lm_head()
    _patch_validate_spec_decode()
    if current_platform.is_cpu():
        _patch_expand_batch_to_tokens()
        _patch_setup_kernel()


def install_hooks(
    before_config: Callable[[Any], None], after_load: Callable[[Any], None], after_update: Callable[[Any], None]
) -> None:
    """Install the patches for engines of other frameworks; a second call changes nothing.

    Args:
        before_config: called with every `EngineArgs` before it is used.
        after_load: called with every worker that has loaded its model.
        after_update: called with every worker that has got new weights.

    Raises:
        RuntimeError: the installed vLLM is not among the tested versions.
    """
    _patch_create_engine_config(before_config)
    _patch_load_model(after_load)
    _patch_reload_weights(after_update)
    _patch_finish_weight_update(after_update)


@_patch("GPUModelRunner._sample")
def _patch_sample(vocab_limit: int | None) -> None:
    stock = GPUModelRunner._sample

    def sample(runner: Any, logits: Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        options = coupled_sampler.request_options(runner)
        seeds = coupled_sampler.seeds_of(options, runner.device)
        if seeds is None:
            coupled_sampler.set_draft_noise(runner, None)
            if vocab_limit is not None:
                logits[:, vocab_limit:] = -torch.inf
            return stock(runner, logits, spec_decode_metadata)
        return coupled_sampler.sample(runner, logits, options, seeds, spec_decode_metadata, vocab_limit)

    GPUModelRunner._sample = sample


@_patch("GPUModelRunner.execute_model")
def _patch_execute_model() -> None:
    stock = GPUModelRunner.execute_model

    def execute_model(runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if SETTINGS_KEY in runner.vllm_config.additional_config:
            plain = _head_is_idle(runner, scheduler_output) and not scheduler_output.scheduled_spec_decode_tokens
            runner.speculative_config = None if plain else runner.vllm_config.speculative_config
            runner.effective_drafter_max_model_len = sys.maxsize
            setattr(runner, LENIENT_DRAFTS, getattr(scheduler_output, "lenient_drafts", {}))
        return stock(runner, scheduler_output, *args, **kwargs)

    GPUModelRunner.execute_model = execute_model


@_patch("GPUModelRunner.propose_draft_token_ids")
def _patch_propose_draft_token_ids() -> None:
    stock = GPUModelRunner.propose_draft_token_ids

    def propose_draft_token_ids(runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if _head_is_idle(runner, scheduler_output):
            return []
        return stock(runner, scheduler_output, *args, **kwargs)

    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids


def _head_is_idle(runner: Any, scheduler_output: Any) -> bool:
    idle: bool = scheduler_output.num_spec_tokens_to_schedule == eagle.HEAD_IDLE
    return idle or isinstance(getattr(runner, "drafter", None), NoDrafts)


@_patch("SpecDecodeBaseProposer._sample_draft_tokens")
def _patch_sample_draft_tokens() -> None:
    stock = SpecDecodeBaseProposer._sample_draft_tokens

    def sample_drafts(proposer: Any, hidden_states: Tensor, metadata: SamplingMetadata) -> tuple[Tensor, Tensor | None]:
        noise: DraftNoise | None = getattr(proposer, DRAFT_NOISE, None)
        if noise is None or proposer.use_heterogeneous_vocab:
            return stock(proposer, hidden_states, metadata)
        return noise.sample(proposer.model.compute_logits(hidden_states)), None

    SpecDecodeBaseProposer._sample_draft_tokens = sample_drafts


@_patch("SpecDecodeBaseProposer._maybe_share_embeddings")
def _patch_share_embeddings() -> None:
    stock = SpecDecodeBaseProposer._maybe_share_embeddings

    def share_embeddings(proposer: Any, policy: torch.nn.Module) -> None:
        if proposer.method in ("eagle", "eagle3"):
            proposer.model.has_own_embed_tokens = False
        stock(proposer, policy)

    SpecDecodeBaseProposer._maybe_share_embeddings = share_embeddings


@_patch("SpecDecodeBaseProposer._maybe_share_lm_head")
def _patch_share_lm_head() -> None:
    stock = SpecDecodeBaseProposer._maybe_share_lm_head

    def share_lm_head(proposer: Any, policy: torch.nn.Module) -> None:
        own = getattr(proposer.model, "lm_head", None)
        stock(proposer, policy)
        if proposer.method == "eagle3" and proposer.model.has_own_lm_head:
            proposer.model.lm_head = own

    SpecDecodeBaseProposer._maybe_share_lm_head = share_lm_head


@_patch("SamplingParams._validate_spec_decode")
def _patch_validate_spec_decode() -> None:
    stock = SamplingParams._validate_spec_decode

    def validate_spec_decode(parameters: SamplingParams, speculative_config: Any) -> None:
        if SEED_KEY not in (parameters.extra_args or {}):
            stock(parameters, speculative_config)

    SamplingParams._validate_spec_decode = validate_spec_decode


@_patch("rejection_sampler.expand_batch_to_tokens")
def _patch_expand_batch_to_tokens() -> None:
    def expand_batch_to_tokens(
        values: Tensor,
        cu_num_tokens: Int[Tensor, "batch"],
        num_tokens: int,
        replace_from: int = 0,
        replace_to: int = 0,
    ) -> Tensor:
        """values [batch] repeated for each request's draft tokens, with one value replaced."""
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
        replaced = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
        return replaced.repeat_interleave(counts, output_size=num_tokens)

    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


@_patch("UnquantizedFusedMoEMethod._setup_kernel")
def _patch_setup_kernel() -> None:
    stock = UnquantizedFusedMoEMethod._setup_kernel

    @wraps(stock)
    def set_up(self: Any, layer: Any, w13: Tensor, w2: Tensor) -> None:
        is_update = self.moe_kernel is not None
        stock(self, layer, w13, w2)
        if is_update:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    UnquantizedFusedMoEMethod._setup_kernel = set_up


@_patch("EngineArgs.create_engine_config")
def _patch_create_engine_config(before: Callable[[Any], None]) -> None:
    stock = EngineArgs.create_engine_config

    @wraps(stock)
    def create_engine_config(engine_args: Any, *arguments: Any, **named: Any) -> Any:
        before(engine_args)
        return stock(engine_args, *arguments, **named)

    EngineArgs.create_engine_config = create_engine_config


@_patch("Worker.load_model")
def _patch_load_model(after: Callable[[Any], None]) -> None:
    Worker.load_model = _followed(Worker.load_model, after)


@_patch("Worker.reload_weights")
def _patch_reload_weights(after: Callable[[Any], None]) -> None:
    Worker.reload_weights = _followed(Worker.reload_weights, after)


@_patch("Worker.finish_weight_update")
def _patch_finish_weight_update(after: Callable[[Any], None]) -> None:
    Worker.finish_weight_update = _followed(Worker.finish_weight_update, after)


def _followed(stock: Callable[..., None], after: Callable[[Any], None]) -> Callable[..., None]:
    @wraps(stock)
    def both(worker: Any, *arguments: Any, **named: Any) -> None:
        stock(worker, *arguments, **named)
        after(worker)

    return both
