"""The section `rollout` of an experiment file: the engines, how they sample, and what makes them fast."""

from typing import Any, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from megatron_rl.config.errors import ConfigError
from megatron_rl.config.history import HistoryConfig
from megatron_rl.config.section import Section

Quantization = Literal["none", "int8", "fp8", "fp8_channel", "fp8_block"]


RENAMED_RULES = {"beg": "epsilon_greedy", "model": "thompson"}
"""Values of `rollout.speculation.adaptive` that had other names."""


class SpeculationConfig(Section):
    """Drafts that the engines verify: they change how fast tokens come, never which."""

    drafters: list[Literal["ngram", "eagle"]] = ["ngram"]
    """Where drafts come from. ngram: what followed the same tokens before, in the request, its group or any other;
    eagle: the trained head of section `drafter`."""
    adaptive: Literal["off", "static", "epsilon_greedy", "thompson"] = "off"
    """off: no drafts; static: always `max_draft_tokens`; epsilon_greedy: per batch size the number that gave most
    tokens a second; thompson: the number that a latency and acceptance model, learned while running, predicts best
    (Thompson sampling)."""
    max_draft_tokens: int = Field(8, ge=1, le=64)
    """Most draft tokens per request and step."""
    memory_mb: PositiveInt = 256
    """Memory of the n-gram counts per engine, in MiB; the oldest are forgotten."""

    @property
    def uses_head(self) -> bool:
        """Whether engines draft with the head of section `drafter`."""
        return self.adaptive != "off" and "eagle" in self.drafters

    @field_validator("adaptive", mode="before")
    @classmethod
    def _accept_off_and_name_successors(cls, value: Any) -> Any:
        if isinstance(value, str) and value in RENAMED_RULES:
            raise ConfigError(f"rollout.speculation.adaptive={value} is called {RENAMED_RULES[value]} now.")
        # YAML 1.1 reads a bare `off` as false.
        return "off" if value is False else value


class RolloutConfig(Section):
    """The fleet of vLLM engines."""

    engines: PositiveInt = 1
    """Number of engines."""
    tp_size: PositiveInt = 1
    """Tensor parallel size of each engine."""
    placement: Literal["colocated", "separate"] = "colocated"
    """colocated: engines share the trainer's devices; separate: they have devices of their own."""
    sleep: Literal[0, 1, 2] = 0
    """What colocated GPU engines give up while the trainer works. 0: nothing; 1: keys and values, and the weights move
    to host memory; 2: keys, values and weights, which the next sync brings anyway. CPU engines keep their memory."""
    max_tokens: PositiveInt = 1024
    """Longest response, in tokens."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature of training rollouts."""
    sampling: dict[str, Any] = Field(default_factory=dict)
    """Further options of vLLM's SamplingParams for all rollouts, e.g. `top_p: 0.95`, `min_tokens: 8`. The log-probs are
    those of the distribution that they leave, which the trainer's are not."""
    sampler: Literal["coupled", "rejection"] = "coupled"
    """How tokens are sampled and drafts verified. coupled: by the seed's noise, so that rollouts are reproducible and
    the same with any drafts; rejection: by vLLM's own rule, for comparison."""
    speculation: SpeculationConfig = SpeculationConfig()
    """Drafts that the engines verify."""
    history: HistoryConfig = HistoryConfig()
    """Reuse of the responses of earlier epochs."""
    quantization: Quantization | list[Quantization] = "none"
    """Precision of the linear layers' weights and activations in the engines, quantized anew at every sync. int8: a
    scale per output channel and per token; fp8 (GPUs): scales per tensor, per channel, or per block of 128 x 128. Or a
    list, for a mixed fleet: engine i takes entry `i mod length`."""
    quantization_skip: list[str] = Field(default_factory=list)
    """Linear layers that stay in the engine's own precision: `first:N` and `last:N` decoder layers, or patterns of
    names such as `*.down_proj` and `model.layers.3.*`. Fused projections (q, k, v; gate, up) stay together."""
    precision_tail: float = Field(0.0, ge=0, lt=1)
    """In a mixed fleet: quantized engines begin all responses, and this share of them, the longest ones, is finished by
    the engines without quantization (see `docs/quantization.md`); 0: each response stays where it began."""
    quantization_profile: str | None = None
    """For int8: file of `megatron-rl quantize setup`, with each layer's smoothing and clipping and the layers to leave
    out. Engines read it when they start; on several nodes it has to be where all see it."""
    quantization_max_error: PositiveFloat = 0.1
    """Largest relative error of a layer in int8: of its output for `megatron-rl quantize setup`, which leaves layers
    beyond it in high precision, and of its weights for a warning after a sync."""
    lm_head_fp32: bool = False
    """Compute the logits in float32, also in bf16 engines. The output layer is never quantized."""
    weight_sync: Literal["auto", "shm", "ipc", "nccl"] = "auto"
    """How weights reach the engines: shm (shared memory, CPU), ipc (colocated GPUs), nccl (separate GPUs)."""
    async_steps: int = Field(0, ge=0)
    """Steps by which generation may be ahead of training, so that the two overlap (see `docs/async.md`). 0: none, each
    step's responses are sampled with the newest weights; n: with weights up to n updates older."""
    partial: bool = False
    """A step begins as soon as enough prompts are answered; responses that are not finished then continue in the next
    one. Their first tokens are of older weights (see `docs/async.md`)."""
    partial_fraction: PositiveFloat = 0.25
    """For partial: prompts in progress beyond those that a step needs, as a share of `train.prompts_per_step`."""
    verify_weights: bool = False
    """After every sync compare checksums of the engines' weights with the trainer's, and stop when they differ."""
    max_restarts: int = Field(3, ge=0)
    """How often, over the run, one engine may die and be restarted before the run stops."""
    threads: PositiveInt | None = None
    """CPU threads per engine; null: all cores when colocated, divided by the number of engines."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Options of vLLM's engine by their own names, e.g. `gpu_memory_utilization: 0.5`, `enforce_eager: true`."""

    @property
    def precisions(self) -> list[str]:
        """Each engine's entry of `quantization`."""
        entries = [self.quantization] if isinstance(self.quantization, str) else self.quantization
        return [entries[engine % len(entries)] for engine in range(self.engines)]

    @property
    def overlap_setting(self) -> str | None:
        """The setting by which a response may have tokens of several policies, as `key=value`; None: there is none."""
        if self.async_steps:
            return f"rollout.async_steps={self.async_steps}"
        return "rollout.partial=true" if self.partial else None

    @field_validator("quantization", mode="before")
    @classmethod
    def _only_known_precisions(cls, value: Any) -> Any:
        # Of a value that is neither a name nor a list of names, pydantic would list how it is neither.
        known = get_args(Quantization)
        entries = value if isinstance(value, list) else [value]
        if not entries or not all(entry in known for entry in entries):
            raise ConfigError(
                f"rollout.quantization={value!r} is not valid; it is one of {', '.join(known)}, or a list."
            )
        return value
