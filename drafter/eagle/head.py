"""The EAGLE head: one decoder layer that reads the policy's hidden states and drafts several tokens ahead.

Two forms, both computing what vLLM computes when it drafts with the checkpoint (its models `llama_eagle3` and
`llama_eagle`):

- `eagle3` (arXiv 2503.01840): hidden states from three depths of the policy are fused by `fc`; the layer attends from
  [norm(embedding of the next token); norm(fused)]; the final norm and an `lm_head` over the draft vocabulary follow.
- `eagle` (arXiv 2401.15077): the policy's final hidden state and the next token's embedding are fused by `fc`, the
  layer has no norm before its attention, nothing follows it, and the policy's own head gives the logits.

At position p the head reads the policy's features of p and the embedding of token p + 1, with rotary position p, and
proposes token p + 2. From then on it reads its own output in place of the features, and the position counts on.
The policy's embedding and output layer are passed in, and are not part of the head. They and the features may have
another dtype than the head, which computes in its own: a float32 head learns from a bfloat16 policy.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from drafter.eagle import rope
from drafter.eagle.packed_rows import sequence_numbers
from drafter.eagle.vocabulary import DraftVocabulary


@dataclass(frozen=True)
class HeadConfig:
    """Shape and form of a head."""

    kind: Literal["eagle3", "eagle"]
    hidden_size: int
    """Of the policy and the head."""
    heads: int
    kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    """Of the policy: rows of its embedding."""
    draft_vocab_size: int
    """Tokens that the head can propose; `eagle` proposes all."""
    aux_layers: tuple[int, ...]
    """EAGLE-3: the depths read, ascending, as vLLM numbers them: i is the residual stream after i layers, 0 the
    embedding. Empty for `eagle`."""
    norm_eps: float
    rope: dict[str, Any]
    """`rope_theta`, `rope_type` and the parameters of its scaling, as transformers names them."""
    max_positions: int
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} attention heads are no multiple of {self.kv_heads} key/value heads.")
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise ValueError(f"The draft vocabulary has {self.draft_vocab_size} tokens, the policy {self.vocab_size}.")
        if self.kind == "eagle" and (self.aux_layers or self.draft_vocab_size != self.vocab_size):
            raise ValueError("An eagle head reads the final hidden state and proposes from the whole vocabulary.")
        if self.kind == "eagle3" and (not self.aux_layers or list(self.aux_layers) != sorted(set(self.aux_layers))):
            raise ValueError(f"aux_layers={self.aux_layers} have to ascend: vLLM passes each depth once, in order.")
        rope.inverse_frequencies(self.rope, self.head_dim)

    @classmethod
    def for_policy(
        cls, hf: dict[str, Any], kind: Literal["eagle3", "eagle"] = "eagle3", draft_vocab_size: int | None = None
    ) -> "HeadConfig":
        """A head as wide as its policy.

        Args:
            hf: the policy's `config.json` (Llama, Qwen2 or Qwen3).
            kind: form of the head.
            draft_vocab_size: tokens that the head can propose; None: all of the policy's.
        """
        heads = hf["num_attention_heads"]
        return cls(
            kind=kind,
            hidden_size=hf["hidden_size"],
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            ffn_hidden_size=hf["intermediate_size"],
            vocab_size=hf["vocab_size"],
            draft_vocab_size=draft_vocab_size or hf["vocab_size"],
            aux_layers=default_aux_layers(hf["num_hidden_layers"]) if kind == "eagle3" else (),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope=rope.parameters(hf),
            max_positions=hf.get("max_position_embeddings", 2048),
        )


def default_aux_layers(policy_layers: int) -> tuple[int, ...]:
    """Low, middle and high depth of a policy: 2, L/2 and L - 3, which is vLLM's default too.

    Below seven layers these would not ascend, so other depths are used (a policy of one layer has only two).
    """
    if policy_layers >= 7:
        return 2, policy_layers // 2, policy_layers - 3
    if policy_layers >= 4:
        return 1, policy_layers // 2, policy_layers - 1
    return tuple(range(max(policy_layers - 2, 0), policy_layers + 1))


class EagleHead(nn.Module):
    """The trainable part of a drafter. Parameters carry the names of public EAGLE-3 checkpoints."""

    d2t: Int[Tensor, "draft_vocab"]
    t2d: Bool[Tensor, "vocab"]

    def __init__(self, config: HeadConfig, vocabulary: DraftVocabulary | None = None) -> None:
        """Random weights, float32.

        Args:
            config: shape and form.
            vocabulary: of `config.draft_vocab_size` tokens; needed if that is reduced.

        Raises:
            ValueError: `vocabulary` is missing or has another size.
        """
        super().__init__()
        self.config = config
        inputs = len(config.aux_layers) if config.kind == "eagle3" else 2
        self.fc = nn.Linear(inputs * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = _DraftLayer(config)
        if config.kind == "eagle3":
            self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self._set_vocabulary(vocabulary)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.init_std)

    def _set_vocabulary(self, vocabulary: DraftVocabulary | None) -> None:
        config = self.config
        if vocabulary is None:
            vocabulary = DraftVocabulary(torch.arange(config.vocab_size), config.vocab_size)
        if (len(vocabulary.token_ids), vocabulary.vocab_size) != (config.draft_vocab_size, config.vocab_size):
            raise ValueError(
                f"The head proposes {config.draft_vocab_size} of {config.vocab_size} tokens, but its vocabulary names "
                f"{len(vocabulary.token_ids)} of {vocabulary.vocab_size}."
            )
        # For a full vocabulary vLLM has no mapping, and refuses a file that contains one.
        reduced = config.draft_vocab_size < config.vocab_size
        self.register_buffer("d2t", vocabulary.d2t, persistent=reduced)
        self.register_buffer("t2d", vocabulary.t2d, persistent=reduced)

    @property
    def token_ids(self) -> Int[Tensor, "draft_vocab"]:
        """int64: the policy's id of each draft id."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def proposed_ids(self, sampled_vocab: int) -> Int[Tensor, "proposed"]:
        """`token_ids` below `sampled_vocab`: those of the first draft ids, as they ascend. Engines mask the others."""
        token_ids = self.token_ids
        return token_ids[token_ids < sampled_vocab]

    @torch.no_grad()
    def copy_policy_head(self, policy_lm_head: Float[Tensor, "sampled_vocab hidden"]) -> None:
        """Initialise `lm_head` with the policy's rows for the draft vocabulary, which shortens training (EAGLE-3)."""
        proposed = self.proposed_ids(len(policy_lm_head))
        self.lm_head.weight[: len(proposed)].copy_(policy_lm_head[proposed])

    def fuse(self, hidden_states: Float[Tensor, "seq features"]) -> Float[Tensor, "seq hidden"]:
        """The policy's features as the state that the first step reads."""
        fused: Tensor = self.fc(hidden_states) if self.config.kind == "eagle3" else hidden_states
        return fused

    def logits(
        self, states: Float[Tensor, "*rows hidden"], policy_lm_head: Float[Tensor, "sampled_vocab hidden"]
    ) -> Float[Tensor, "*rows draft_vocab"]:
        """Logits over the draft vocabulary, of which those of `proposed_ids` count; they come first.

        Args:
            states: what a step returns.
            policy_lm_head: the policy's output layer; EAGLE-3 does not use it.
        """
        if self.config.kind == "eagle":
            return F.linear(states, policy_lm_head.to(states.dtype))
        logits: Tensor = self.lm_head(self.norm(states))
        return logits

    def start(
        self, hidden_states: Float[Tensor, "seq features"], cu_seqlens: Int[Tensor, "sequences+1"]
    ) -> "UnrolledDrafts":
        """Begin drafts at every position of a packed row (see `drafter.eagle.packed_rows`)."""
        return UnrolledDrafts(self, hidden_states, cu_seqlens)


class UnrolledDrafts:
    """Drafts from all anchors of a packed row at once, one token further with each `step`.

    Step i of anchor p attends to the policy's features up to p, and to the head's own outputs of the earlier steps of
    the same anchor: the same as in a draft that starts there.
    """

    def __init__(self, head: EagleHead, hidden_states: Tensor, cu_seqlens: Tensor) -> None:
        length = len(hidden_states)
        numbers = sequence_numbers(cu_seqlens, length)
        positions = torch.arange(length, device=numbers.device)
        self._head = head
        self._dtype = head.fc.weight.dtype
        self._state = head.fuse(hidden_states.to(self._dtype))
        config = head.config
        self._cache = _AttentionCache(
            frequencies=rope.inverse_frequencies(config.rope, config.head_dim).to(numbers.device),
            factor=rope.attention_factor(config.rope),
            positions=positions - cu_seqlens[numbers],
            mask=(numbers[:, None] == numbers[None, :]) & (positions[:, None] >= positions[None, :]),
            keys=[],
            values=[],
        )

    def step(self, embeddings: Float[Tensor, "seq hidden"]) -> Float[Tensor, "seq hidden"]:
        """Run one step.

        Args:
            embeddings: by anchor, of its newest token (p + 1 + i in step i).

        Returns:
            The head's states; `EagleHead.logits` of them proposes token p + 2 + i.
        """
        head = self._head
        embeddings = embeddings.to(self._dtype)
        if head.config.kind == "eagle":
            residual = head.fc(torch.cat([embeddings, self._state], dim=-1))
            inputs = residual
        else:
            residual = self._state
            normed = head.midlayer.input_layernorm(embeddings), head.midlayer.hidden_norm(residual)
            inputs = torch.cat(normed, dim=-1)
        self._state = head.midlayer(inputs, residual, self._cache)
        return self._state


@dataclass(frozen=True)
class _AttentionCache:
    """What the attention of an unrolled row needs of it, and of the steps so far."""

    frequencies: Float[Tensor, "half_head_dim"]
    """float32 whatever the head's dtype is: bfloat16 angles would be wrong."""
    factor: float
    """What rotated queries and keys are multiplied by (`rope.attention_factor`)."""
    positions: Int[Tensor, "seq"]
    mask: Bool[Tensor, "seq seq"]
    """[p, q]: q is a position of p's sequence, and not after p."""
    keys: list[Float[Tensor, "kv_heads seq head_dim"]]
    """Of each step so far; those of step 0 belong to the policy's features."""
    values: list[Float[Tensor, "kv_heads seq head_dim"]]


class _DraftLayer(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        if config.kind == "eagle3":
            self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
            self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = _FeedForward(config)

    def forward(self, inputs: Tensor, residual: Tensor, cache: _AttentionCache) -> Tensor:
        residual = residual + self.self_attn(inputs, cache)
        out: Tensor = residual + self.mlp(self.post_attention_layernorm(residual))
        return out


class _FeedForward(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(inputs)) * self.up_proj(inputs))
        return out


class _Attention(nn.Module):
    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        inputs = config.hidden_size * (2 if config.kind == "eagle3" else 1)
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(inputs, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(inputs, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(inputs, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)

    def forward(self, inputs: Tensor, cache: _AttentionCache) -> Tensor:
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        positions = cache.positions + len(cache.keys)
        query, key = (rope.rotate(part, positions, cache.frequencies, cache.factor) for part in (query, key))
        cache.keys.append(key)
        cache.values.append(value)
        mixed = attend(query, cache.keys, cache.values, cache.mask)
        out: Tensor = self.o_proj(mixed.transpose(0, 1).flatten(1))
        return out


def attend(
    query: Float[Tensor, "heads seq head_dim"],
    keys: list[Float[Tensor, "kv_heads seq head_dim"]],
    values: list[Float[Tensor, "kv_heads seq head_dim"]],
    mask: Bool[Tensor, "seq seq"],
) -> Float[Tensor, "heads seq head_dim"]:
    """Attention of row p to keys[0] where `mask[p]` allows, and to row p alone of all further keys.

    The softmax is over both together. The further keys cost one column each. (A mask over [keys[0]; keys[1]; ...] would
    let `scaled_dot_product_attention` do all the work, but each step would cost as much as the first.)

    Args:
        query: of the newest step.
        keys: of each step so far.
        values: of each step so far.
        mask: [p, q]: row p attends to row q of the first step.
    """
    if len(keys) == 1:
        return F.scaled_dot_product_attention(
            query[None], keys[0][None], values[0][None], attn_mask=mask, enable_gqa=True
        )[0]
    kv_heads, length, head_dim = keys[0].shape
    query = query.unflatten(0, (kv_heads, -1)) * head_dim**-0.5
    past = (query @ keys[0][:, None].mT).masked_fill(~mask, -torch.inf)
    own = torch.stack([(query * key[:, None]).sum(dim=-1) for key in keys[1:]], dim=-1)
    share = torch.cat([past, own], dim=-1).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    mixed = share[..., :length] @ values[0][:, None]
    for column, value in enumerate(values[1:], start=length):
        mixed = mixed + share[..., column, None] * value[:, None]
    return mixed.flatten(0, 1)
