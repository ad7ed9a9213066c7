"""The sections of an experiment file that are not in files of their own."""

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_rl.config.section import Section


class ScratchModelConfig(Section):
    """A small Qwen3-style model with random weights and a character tokenizer, made when `model.path` has none."""

    hidden_size: PositiveInt = 192
    """Width of the residual stream."""
    layers: PositiveInt = 6
    """Number of decoder layers."""
    heads: PositiveInt = 6
    """Number of attention heads."""
    kv_heads: PositiveInt = 2
    """Number of key/value heads (grouped-query attention)."""
    head_dim: PositiveInt = 32
    """Size of one attention head."""
    ffn_hidden_size: PositiveInt = 512
    """Width of the gated feed-forward layer."""
    max_positions: PositiveInt = 1024
    """Longest sequence the model accepts, in tokens."""
    tie_embeddings: bool = True
    """Share the input embedding with the output layer."""


class ModelConfig(Section):
    """The policy."""

    path: str
    """A Llama, Qwen2, Qwen3 or Qwen3-MoE model: a folder with Hugging Face files, a checkpoint or converted folder of
    ours, or a name on the Hugging Face hub, `Org/Name` or `Org/Name@revision`. What the run downloads goes to the hub's
    cache (HF_HOME) of each node; `run_dir/config.yaml` keeps the commit."""
    family: str | None = Field(None, pattern=r"^[\w.]+:\w+$")
    """For a model of another architecture of the same kind: `module:NAME` of a `ModelFamily` of yours, which says what
    differs (`megatron_rl/config/families.py`, `examples/model_family`); vLLM has to know the architecture."""
    ignored_keys: list[str] = Field(default_factory=list)
    """Keys of the model's `config.json` that this program does not know, and that you know to change nothing. Any other
    unknown key is refused: it may change what the model computes."""
    check: Literal["auto", "off"] = "auto"
    """Whether a new run first compares the log-probs of its trainer and its engines with those of transformers, on one
    short text; `auto`: for models of up to a billion parameters."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Training precision: fp32; bf16 with fp32 master weights; fp8 (needs a GPU and Transformer Engine)."""
    scratch: ScratchModelConfig | None = None
    """For `sft` only: make this model from scratch, with random weights, at the start."""
    megatron: dict[str, Any] = Field(default_factory=dict)
    """Options of megatron-core's `TransformerConfig` by their own names, e.g. `attention_softmax_in_fp32: true`."""


class ParallelConfig(Section):
    """How the trainer's model is split over devices."""

    tp_size: PositiveInt = 1
    """Tensor parallel size: each layer is split over this many devices."""
    pp_size: PositiveInt = 1
    """Pipeline parallel size: the layers are split into this many stages."""
    dp_size: PositiveInt | None = None
    """Data parallel size; null: follows from the number of processes that torchrun started (1 without torchrun on a
    CPU, all visible GPUs on a GPU machine)."""
    cp_size: PositiveInt = 1
    """Context parallel size: the tokens of each sequence are dealt to this many devices, for long responses. Saves
    with Transformer Engine's attention on GPUs; elsewhere the same is computed, without a gain."""
    ep_size: PositiveInt = 1
    """Expert parallel size, for a mixture of experts: the experts of a layer are dealt to this many devices of its
    stage, whole ones to each; it divides tp_size * cp_size * dp_size."""
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel parts along the sequence (needs tp_size > 1 and Transformer
    Engine)."""

    @property
    def model_size(self) -> int:
        """Devices that hold one replica of the model."""
        return self.tp_size * self.pp_size * self.cp_size


class ArithmeticConfig(Section):
    """The built-in generator of arithmetic problems: products with powers of two, solved by repeated doubling."""

    digits: int = Field(5, ge=1, le=12)
    """Digits that every number is written with."""
    min_doublings: int = Field(2, ge=1, le=6)
    """Fewest doublings, which are the steps of a solution: 2 for `*04`."""
    max_doublings: int = Field(6, ge=1, le=6)
    """Most doublings: 6 for `*64`."""
    direct_fraction: float = Field(0.65, ge=0, le=1)
    """Share of demonstrations (for `sft`) that answer at once, without writing out the steps."""
    train_size: PositiveInt = 20_000
    """Number of training problems."""
    eval_size: PositiveInt = 256
    """Number of held-out problems; none of them is a training problem."""


class DataConfig(Section):
    """Prompts to train and evaluate on."""

    train: str = "arithmetic"
    """`arithmetic` (built in), a `.jsonl` or `.parquet` file, a function of yours as `package.module:function` that
    returns or yields records (see `docs/data.md`), or the name of a `datasets` data set (`name:configuration`, or
    `name:file` with a file in it, when it has several)."""
    eval: list[str] = Field(default_factory=lambda: ["arithmetic-heldout"])
    """Sets of held-out prompts: `arithmetic-heldout`, files, functions of yours, `datasets` names, or public sets by
    `NAME` or `NAME=FILE` (see `docs/evaluation.md`)."""
    templates: dict[str, str] = Field(default_factory=dict)
    """User messages for public sets of `eval`, by their names, instead of their own; `{problem}` stands for the
    problem."""
    split: str = "train"
    """Split to read when `train` is a `datasets` name."""
    eval_split: str = "test"
    """Split to read for the sets of `eval` that are `datasets` names."""
    prompt_key: str = "prompt"
    """Column with the prompt: a text, or a list of chat messages (also as JSON text)."""
    answer_key: str = "answer"
    """Column with the reference answer (verl's `reward_model.ground_truth` is understood without this)."""
    response_key: str = "response"
    """Column with the demonstration to imitate, for `sft`: a text, or a list with one message of the assistant."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are left out, and counted in the log; they do not count as records that cannot be used."""
    max_left_out: float = Field(0.05, ge=0, le=1)
    """Share of a set's records that may be left out because they cannot be used (see `docs/data.md`); with more, the
    run ends before it starts."""
    seed: int = 0
    """Seed of the order in which prompts are visited (and of the arithmetic generator)."""
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    """Shape of the built-in problems."""


class LengthPenaltyConfig(Section):
    """Soft penalty for long responses: falls linearly from 0 at `start` tokens to `-coef` at `rollout.max_tokens`."""

    start: PositiveInt
    """Response length, in tokens, from which the penalty grows."""
    coef: PositiveFloat = 1.0
    """Penalty at the length limit."""


class RewardConfig(Section):
    """How a response is scored."""

    name: Literal["exact", "numeric", "math", "choice"] = "math"
    """exact: the answer text is equal; numeric: the last number is equal; math: math-verify on the (boxed) answer;
    choice: the chosen letter is equal."""
    function: str | None = None
    """A function of yours as `package.module:function`, called as `f(prompt, response, answer) -> float`, instead of
    `name`."""
    timeout_s: PositiveFloat = 10.0
    """Seconds after which the scoring of one response is given up and counted as 0."""
    environment: list[str] = Field(default_factory=list)
    """Names of environment variables that the reward's process sees beside the usual ones (`PATH`, `HOME`, caches):
    the key of a service that judges, for instance. It does not see others."""
    length_penalty: LengthPenaltyConfig | None = None
    """Optional penalty for long responses, added to the score."""


class TrainConfig(Section):
    """The optimisation."""

    steps: PositiveInt = 100
    """RL steps (for `sft`: optimizer steps)."""
    prompts_per_step: PositiveInt = 32
    """Prompts per RL step, each sampled `algorithm.group_size` times (for `sft`: demonstrations per step)."""
    num_minibatches: PositiveInt = 1
    """Optimizer steps per RL step."""
    tokens_per_microbatch: PositiveInt = 4096
    """Token budget of one micro-batch; whole sequences are packed into it."""
    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end as a share of `lr`, when it decays."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay of the learning rate after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which the learning rate rises linearly from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay, of weight matrices and embeddings."""
    decay_all: bool = False
    """Let norms and biases decay, too."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """First moment decay."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """Second moment decay."""
    clip_grad: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""
    max_skipped_updates: PositiveInt = 3
    """Updates in a row whose loss or gradient is not finite, and which are therefore skipped, that end the run."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again to save memory: nothing; selective: the feed-forward layers; full: whole
    layers, of which only the inputs are kept. Gradients are the same."""
    router_aux_loss: float = Field(0.0, ge=0)
    """Weight of the loss that balances the load of the experts (Switch Transformer, arXiv 2101.03961); 0: none, since
    it pulls a trained router away from the policy that is rewarded."""
    router_z_loss: float = Field(0.0, ge=0)
    """Weight of the loss that keeps the logits of the router small (ST-MoE, arXiv 2202.08906); 0: none."""
    seed: int = 0
    """Seed of the run: rollout sampling and random initial weights derive from it."""
    threads: PositiveInt | None = None
    """CPU threads per trainer process; null: the machine's cores divided by its trainer processes."""
    hang_timeout_s: PositiveFloat | None = 3600.0
    """Seconds without any progress (no micro-batch, no finished response, no new phase) after which `train` names the
    trainer process and the phase that hang, writes all stacks to the logs, and ends; null: never."""


class DrafterConfig(Section):
    """The EAGLE head that drafts for the engines when `rollout.speculation.drafters` has `eagle`, and its training."""

    kind: Literal["eagle3", "eagle"] = "eagle3"
    """eagle3: reads hidden states of three depths of the policy; eagle: only the last one."""
    path: str | None = None
    """Folder of a trained head in vLLM's format (see `megatron-rl drafter warmup`); null: start from random weights."""
    draft_vocab: PositiveInt | None = None
    """Most frequent tokens that a new eagle3 head can propose; null: the whole vocabulary."""
    fill: list[Literal["bubbles", "tails"]] = ["bubbles"]
    """Idle time in which the head is trained: pipeline bubbles, and the wait for the last rollouts of a step, which is
    idle only where the engines have devices or cores of their own."""
    min_slices: int = Field(0, ge=0)
    """Full slices of training that every step runs, after its update if idle time had no room for so many tokens. With
    0 and an empty `fill` the head stays as it is."""
    publish_every: PositiveInt = 1
    """Steps between attempts to hand the trained head to the engines, which get it only when it drafts better."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate of the head."""
    unroll: int = Field(4, ge=1, le=7)
    """Draft tokens that training looks ahead."""
    tokens_per_slice: PositiveInt = 256
    """Longest packed row of one slice, which short idle times halve until it fits; longer responses are cut into
    windows."""
    tokens_per_step: PositiveInt = 8192
    """Tokens of each step's rollouts whose hidden states are kept; an eighth of them is not trained on but measures how
    well the head drafts."""
    memory_mb: PositiveInt = 1024
    """Host memory for hidden states of the policy, in MiB per trainer process; those of old versions go first."""

    @property
    def trains(self) -> bool:
        """Whether the head learns during the run."""
        return bool(self.fill or self.min_slices)


class EvalConfig(Section):
    """Evaluation on held-out prompts: before the first step, every `every` steps, and at the end."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before the first step and at the end."""
    schedule: dict[str, PositiveInt] = Field(default_factory=dict)
    """Steps between evaluations of single sets, by their names, instead of `every`: e.g. `mmlu_stem: 100`."""
    samples: int = Field(0, ge=0)
    """Responses per prompt at `rollout.temperature`, beside the greedy one, for avg@k, pass@k and majority@k; 0: greedy
    only."""
    max_prompts: PositiveInt | None = None
    """Use only the first so many prompts of each set."""
    best: str | None = None
    """Keep the best policy in `run_dir/best`, by `SET/greedy_accuracy`, `SET/avg_at_k`, `SET/pass_at_k` or
    `SET/majority_at_k`, or by the mean over all sets with the second half alone; null: do not."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: int = Field(0, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    resume: Literal["auto", "never", "force"] = "auto"
    """auto: continue from the newest complete checkpoint in `run_dir`, unless the prompts, their order, batch or the
    model are others now; force: whatever has changed; never: refuse to start when there is one."""
    export_hf: bool = True
    """Write the final policy as a Hugging Face model to `run_dir/hf`."""


class WandbConfig(Section):
    """Weights & Biases tracking."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """Whether and how to log to wandb."""
    project: str = "megatron-rl"
    """Project name."""
    name: str | None = None
    """Run name; null: the name of `run_dir`."""


class TrackConfig(Section):
    """Metrics and reports; `run_dir/metrics.jsonl` is always written."""

    wandb: WandbConfig = WandbConfig()
    """Optional wandb tracking."""
    report: bool = True
    """Write `report.md` with plots to `run_dir` at the end."""
