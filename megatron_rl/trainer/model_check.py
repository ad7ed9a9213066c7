"""Compares a run's own trainer and engines with transformers, before the first step.

Trainer and engines may be wrong alike, and then their log-probs agree: only a third implementation shows it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from megatron_rl.config import Config, ConfigError
from megatron_rl.config.hub import local_folder
from megatron_rl.distributed.coordinator import Coordinator
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.hf_mapping import parameter_count
from megatron_rl.models.stored_tensors import has_hf_weights
from megatron_rl.observability.console import Console
from megatron_rl.trainer.batch import Batch
from megatron_rl.trainer.trainer import Trainer
from rollout.fleet.fleet import RolloutFleet
from rollout.types import RolloutRequest

LARGEST = 1_000_000_000
"""Parameters of the largest model that is compared: 4 GB in float32 on the driver's node."""
TOKENS = 16
LEAST, QUANTIZED = 0.1, 0.6
"""Mean differences in nats that are never an error: rounding, and that of quantized engines and of FP8 training. Wrong
models seen so far differ by 0.8 to 6."""
NOISE = 4.0
"""So many times what rounding to bfloat16 changes in transformers itself is no error either."""


@dataclass(frozen=True)
class Reference:
    """The model in transformers, on the driver's CPU."""

    model: Any
    temperature: float
    vocab_limit: int

    @torch.no_grad()
    def logprobs(self, batch: Batch, dtype: torch.dtype) -> Float[torch.Tensor, "tokens"]:
        """Of the one response of `batch`, computed in `dtype`; float32 [tokens]."""
        prompt, response = batch.prompts[0], batch.responses[0]
        logits = self.model.to(dtype)(torch.tensor([prompt + response]), use_cache=False).logits
        rows = logits[0, len(prompt) - 1 : -1, : self.vocab_limit].float() / self.temperature
        return rows.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def load_reference(config: Config, arch: Architecture, vocab_limit: int, console: Console) -> Reference | None:
    """The model in transformers, or None, with a line that says why, where it cannot be compared.

    Args:
        config: the experiment.
        arch: shape of the model.
        vocab_limit: token ids from here on are excluded from every distribution.
        console: says why not.
    """
    size = parameter_count(arch)
    reason = None
    if size > LARGEST:
        reason = f"it has {size / 1e9:.1f} billion parameters, more than {LARGEST / 1e9:.0f}"
    elif not has_hf_weights(config.model.path):
        reason = "its weights are not in the Hugging Face format"
    elif arch.quantization:
        reason = "its files hold quantized weights"
    if reason is None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(local_folder(config.model.path), dtype=torch.float32)
            return Reference(model.eval(), config.rollout.temperature, vocab_limit)
        except (ValueError, OSError) as error:  # an architecture that only vLLM knows
            reason = f"transformers does not load it: {str(error).splitlines()[0]}"
    console.info(f"the model is not compared with transformers: {reason}")
    return None


def compare(
    reference: Reference | None,
    config: Config,
    trainer: Trainer,
    engines: RolloutFleet | None,
    coordinator: Coordinator,
    console: Console,
    prompt_ids: list[int],
) -> None:
    """Generate a few tokens, and compare their log-probs in the engine, the trainer and transformers. On every rank.

    Args:
        reference: on the driver, what `load_reference` returned; None elsewhere.
        config: the experiment.
        trainer: has the model's weights, as the engines do.
        engines: on the driver.
        coordinator: of this process.
        console: gets a line with the differences.
        prompt_ids: on the driver, what the tokens come after.

    Raises:
        ConfigError: when the differences are no rounding.
    """

    def generate() -> Batch | None:
        if reference is None or engines is None:
            return None
        length, temperature = min(TOKENS, config.rollout.max_tokens), config.rollout.temperature
        request = RolloutRequest("model.check", 0, 0, 0, prompt_ids, length, temperature, ignore_eos=True)
        batch = Batch.from_rollouts(list(engines.generate([request])))
        engines.take_speculation_counts()  # they are not the first step's
        return batch

    batch = coordinator.drive(generate)
    if batch is None:
        return
    ours = trainer.logprobs(batch)
    if reference is None:
        return
    expected = reference.logprobs(batch, torch.float32)
    if not torch.isfinite(expected).all():
        raise ConfigError(
            f"model.path={config.model.path!r} gives log-probs that are not finite in transformers itself; its weights "
            "are damaged."
        )
    noise = float((reference.logprobs(batch, torch.bfloat16) - expected).abs().mean())
    allowed = max(LEAST, NOISE * noise)
    rough = max(allowed, QUANTIZED)
    found = {"trainer": (float((ours - expected).abs().mean()), rough if config.model.precision == "fp8" else allowed)}
    if not config.rollout.sampling:  # else the engine's distribution is another one on purpose
        exact = set(config.rollout.precisions) == {"none"}  # any engine of a mixed fleet may have answered
        difference = float((batch.values["rollout_logprobs"] - expected).abs().mean())
        found["engine"] = (difference, allowed if exact else rough)
    for name, (difference, limit) in found.items():
        if not difference <= limit:  # NaN is no agreement either
            raise ConfigError(
                f"the {name} does not compute model.path={config.model.path!r} as transformers does: the log-probs of "
                f"{len(expected)} tokens differ by {difference:.3g} nats on average, where rounding explains "
                f"{limit:.2g}; use another model, or set model.check=off to train it nevertheless."
            )
    shown = ", ".join(f"{name} {difference:.2g}" for name, (difference, _) in found.items())
    console.info(f"log-probs beside transformers, mean difference in nats: {shown}")
