"""Quantized engines for people who train with another framework on the same vLLM: the `FLASHRL_*` variables.

With this package installed, they act on every vLLM process, through the plugin (`rollout.engine.plugin`):

- `FLASHRL_CONFIG`: bf16 leaves the model as it is, and log-probs become those of the distribution that was sampled
  (temperature, top-k, top-p and masks included), which importance sampling needs; fp8 and int8 quantize the linear
  layers as well, again at every update; so does the path of a file that `megatron-rl quantize setup` wrote.
- `FLASHRL_LMHEAD_FP32=1`: logits are computed in float32.
- `FLASHRL_TEST_RELOAD=1`: after loading, the same weights are loaded once more, and the process ends if that changes
  anything.
- `FLASHRL_LOGGING_LEVEL` (default INFO), `FLASHRL_LOGGING_FILE`: the log of this package, otherwise on standard error.

Without them, nothing of vLLM is changed.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module

from megatron_rl.config import ConfigError
from megatron_rl.config.quantization import read_quantization_file
from rollout.quantization.quantization_settings import METHOD, QuantizationSettings

CONFIG = "FLASHRL_CONFIG"
LM_HEAD_FP32 = "FLASHRL_LMHEAD_FP32"
TEST_RELOAD = "FLASHRL_TEST_RELOAD"
LOGGING_LEVEL = "FLASHRL_LOGGING_LEVEL"
LOGGING_FILE = "FLASHRL_LOGGING_FILE"
VARIABLES = (CONFIG, LM_HEAD_FP32, TEST_RELOAD, LOGGING_LEVEL, LOGGING_FILE)

_KINDS = {"bf16": "none", "fp8": "fp8", "int8": "int8"}
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_EXACT = "processed_logprobs"  # vLLM's `logprobs_mode`
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DropIn:
    """What the variables ask for."""

    quantization: str
    """As `rollout.quantization`."""
    profile: str | None
    """As `rollout.quantization_profile`."""
    exact_logprobs: bool
    lm_head_fp32: bool
    test_reload: bool
    logging_level: str
    logging_file: str | None

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> "DropIn | None":
        """Read the variables; None when none of them is set (or all are empty).

        Raises:
            ConfigError: for a value that is not understood.
        """
        given = {name: environment[name] for name in VARIABLES if environment.get(name)}
        if not given:
            return None
        level = given.get(LOGGING_LEVEL, "INFO").upper()
        if level not in _LEVELS:
            raise ConfigError(f"{LOGGING_LEVEL} is {given[LOGGING_LEVEL]!r}; set it to one of {', '.join(_LEVELS)}.")
        kind, profile = "none", None
        if (config := given.get(CONFIG)) is not None:
            if config not in _KINDS and not Path(config).is_file():
                raise ConfigError(
                    f"{CONFIG} is {config!r}; set it to bf16, fp8, int8 or the path of a file that "
                    "`megatron-rl quantize setup` wrote."
                )
            profile = None if config in _KINDS else config
            kind = _KINDS[config] if profile is None else read_quantization_file(profile).quantization
        return DropIn(
            quantization=kind,
            profile=profile,
            exact_logprobs=CONFIG in given,
            lm_head_fp32=_switch(given, LM_HEAD_FP32),
            test_reload=_switch(given, TEST_RELOAD),
            logging_level=level,
            logging_file=given.get(LOGGING_FILE),
        )

    def start_logging(self) -> None:
        """Send this package's log to the file or to standard error; once per process.

        Raises:
            ConfigError: when the file cannot be written.
        """
        package = logging.getLogger(__package__)
        package.setLevel(self.logging_level)
        if package.handlers:
            return
        handler: logging.Handler = logging.StreamHandler()
        if self.logging_file is not None:
            try:
                handler = logging.FileHandler(self.logging_file)
            except OSError as error:
                raise ConfigError(
                    f"{LOGGING_FILE} is {self.logging_file!r}, which cannot be written ({type(error).__name__}); "
                    "choose another file."
                ) from None
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(process)d] %(message)s"))
        package.addHandler(handler)
        package.propagate = False

    def change_arguments(self, arguments: Any) -> None:
        """Put the settings into vLLM's `EngineArgs`; a second call changes nothing.

        Raises:
            ConfigError: when the arguments, the model or the machine rule them out.
        """
        if self.exact_logprobs:
            if arguments.logprobs_mode not in ("raw_logprobs", _EXACT):
                raise ConfigError(
                    f"{CONFIG} needs vLLM's logprobs_mode={_EXACT}, but it is {arguments.logprobs_mode}; leave it out."
                )
            arguments.logprobs_mode = _EXACT
        if (self.quantization != "none" or self.lm_head_fp32) and arguments.quantization != METHOD:
            self._quantize(arguments)
        log.info("vLLM runs with %s", self)

    def _quantize(self, arguments: Any) -> None:
        from transformers import PretrainedConfig
        from vllm.platforms import current_platform

        source = CONFIG if self.quantization != "none" else LM_HEAD_FP32
        if arguments.quantization is not None or arguments.quantization_config is not None:
            raise ConfigError(f"{source} cannot be combined with vLLM's option quantization; leave one of them out.")
        if callable(arguments.hf_overrides):
            raise ConfigError(f"{source} needs vLLM's option hf_overrides to be a dict, not a function.")
        if self.quantization.startswith("fp8") and current_platform.is_cpu():
            raise ConfigError(f"{source} asks for {self.quantization}, which needs a GPU; use int8 or bf16.")
        hf, _ = PretrainedConfig.get_config_dict(arguments.model, revision=arguments.revision)
        if "quantization_config" in hf:
            raise ConfigError(f"{source} needs an unquantized model, but {arguments.model} is quantized already.")
        layers = int(hf.get("text_config", hf)["num_hidden_layers"])
        settings = QuantizationSettings.for_model(self.quantization, layers, [], self.profile, self.lm_head_fp32)
        arguments.quantization = METHOD
        arguments.hf_overrides = arguments.hf_overrides | {"quantization_config": settings.to_vllm()}


def install_drop_in() -> None:
    """Apply the variables to this process; without them nothing happens.

    Raises:
        ConfigError: for a wrong value.
        RuntimeError: the installed vLLM is not among the tested versions.
    """
    settings = DropIn.from_environment(os.environ)
    if settings is None:
        return
    settings.start_logging()
    from rollout.engine.vllm_patches import install_hooks
    from rollout.quantization.online import register_online_quantization

    # vLLM starts workers on other nodes with the variables of these prefixes.
    prefixes = os.environ.get("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "")
    if "FLASHRL_" not in prefixes:
        os.environ["VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"] = f"{prefixes},FLASHRL_".lstrip(",")
    register_online_quantization()
    install_hooks(settings.change_arguments, check_reload if settings.test_reload else lambda worker: None, renew_heads)


def renew_heads(worker: Any) -> None:
    """After an update: on CPU an output layer that is the embedding multiplies with a copy that vLLM does not renew."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for layer in worker.model_runner.get_model().modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


@torch.inference_mode()
def check_reload(worker: Any) -> None:
    """Load a vLLM worker's weights once more, and compare every tensor and every layer's output for a fixed input.

    Raises:
        ConfigError: when the weights do not come from disk.
        RuntimeError: when anything differs in a bit.
    """
    if worker.vllm_config.load_config.load_format == "dummy":
        raise ConfigError(
            f"{TEST_RELOAD} reads the model from disk, which vLLM's load_format=dummy does not; unset one."
        )
    model = worker.model_runner.get_model()
    before = _fingerprints(model)
    worker.reload_weights()
    after = _fingerprints(model)
    wrong = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if wrong:
        raise RuntimeError(
            f"{TEST_RELOAD}: loading the same weights again changed {len(wrong)} of {len(before)} tensors and "
            f"products, the first is {wrong[0]}: after updates this engine would generate with wrong weights."
        )
    log.info("%s: loading the same weights again changed none of %d tensors and products", TEST_RELOAD, len(before))


def _fingerprints(model: Module) -> dict[str, str]:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    found = {name: _digest(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    # On CPU the plain layers multiply with packed copies that are not parameters.
    for name, layer in model.named_modules():
        if isinstance(layer, LinearBase | ParallelLMHead):
            columns = getattr(layer, "input_size_per_partition", None) or layer.embedding_dim
            x = torch.linspace(-1, 1, 3 * columns).view(3, columns).to(layer.params_dtype)
            device = next(layer.parameters()).device
            found[f"the product of {name}"] = _digest(layer.quant_method.apply(layer, x.to(device)))
    return found


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()


def _switch(given: Mapping[str, str], name: str) -> bool:
    value = given.get(name, "0")
    if value not in ("0", "1"):
        raise ConfigError(f"{name} is {value!r}; set it to 1 or 0.")
    return value == "1"
