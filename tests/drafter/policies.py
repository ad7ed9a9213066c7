"""Tiny policies for the tests of the drafter: their features, their rollouts, and a short training of a head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from drafter.eagle.draft_loss import LossOptions, draft_loss
from drafter.eagle.head import EagleHead, HeadConfig
from drafter.eagle.packed_rows import FrozenPolicy, PackedFeatures


def small_config(kind: str = "eagle3", **overrides: Any) -> HeadConfig:
    options: dict[str, Any] = {
        "kind": kind,
        "hidden_size": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn_hidden_size": 48,
        "vocab_size": 24,
        "draft_vocab_size": 24,
        "aux_layers": (0, 1, 2) if kind == "eagle3" else (),
        "norm_eps": 1e-6,
        "rope": {"rope_theta": 10000.0, "rope_type": "default"},
        "max_positions": 256,
        "init_std": 0.1,
    }
    return HeadConfig(**(options | overrides))


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random_row(
    config: HeadConfig, lengths: list[int], prompt: int = 2, padding: int = 0, seed: int = 0
) -> PackedFeatures:
    """Sequences of random numbers, each with a prompt of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths) + padding
    width = config.hidden_size * max(len(config.aux_layers), 1)
    mask = torch.cat([torch.arange(length) >= prompt for length in lengths] + [torch.zeros(padding, dtype=torch.bool)])
    final = torch.randn(total, config.hidden_size, generator=generator)
    return PackedFeatures(
        token_ids=torch.randint(config.vocab_size, (total,), generator=generator),
        hidden_states=torch.randn(total, width, generator=generator) if config.kind == "eagle3" else final,
        final_hidden=final,
        response_mask=mask,
        cu_seqlens=cumulative(lengths),
    )


def random_policy(config: HeadConfig, seed: int = 1) -> FrozenPolicy:
    generator = torch.Generator().manual_seed(seed)
    shape = config.vocab_size, config.hidden_size
    return FrozenPolicy(torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator))


def pack(rows: list[PackedFeatures], padding: int = 0) -> PackedFeatures:
    """One row of them all, and finite rubbish behind."""

    def joined(name: str) -> Tensor:
        tensors = [getattr(row, name) for row in rows]
        shape = (padding, *tensors[0].shape[1:])
        rubbish = torch.full(shape, 3) if tensors[0].dtype == torch.int64 else torch.full(shape, 7.0)
        return torch.cat([*tensors, rubbish.to(tensors[0].dtype) if name != "response_mask" else torch.ones(shape) > 0])

    lengths = [length for row in rows for length in row.cu_seqlens.diff().tolist()]
    names = ("token_ids", "hidden_states", "final_hidden", "response_mask")
    return PackedFeatures(**{name: joined(name) for name in names}, cu_seqlens=cumulative(lengths))


def model_weights(model: Any) -> FrozenPolicy:
    return FrozenPolicy(model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach())


@torch.no_grad()
def model_features(model: Any, token_ids: list[int], prompt: int, config: HeadConfig) -> PackedFeatures:
    """What a transformers model shows of one sequence, taken where vLLM takes it."""
    streams: list[Tensor] = []
    layers = model.model.layers
    hooks = [layers[0].register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0][0]))]
    hooks += [layer.register_forward_hook(lambda _, __, output: streams.append(output[0])) for layer in layers]
    final = model.model(torch.tensor([token_ids])).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    taken = torch.cat([streams[layer] for layer in config.aux_layers], dim=-1) if config.kind == "eagle3" else final
    mask = torch.arange(len(token_ids)) >= prompt
    return PackedFeatures(torch.tensor(token_ids), taken, final, mask, cumulative([len(token_ids)]))


@torch.no_grad()
def greedy_drafts(head: EagleHead, features: PackedFeatures, policy: FrozenPolicy, k: int) -> Tensor:
    """[seq, k]: what the head proposes from every anchor, fed with its own most likely tokens."""
    drafts = head.start(features.hidden_states, features.cu_seqlens)
    tokens, proposed = features.token_ids.roll(-1), []
    for _ in range(k):
        states = drafts.step(policy.embedding[tokens])
        tokens = head.token_ids[head.logits(states, policy.lm_head).argmax(dim=-1)]
        proposed.append(tokens)
    return torch.stack(proposed, dim=1)


def train(
    head: EagleHead,
    row_of_step: Callable[[int], PackedFeatures],
    policy: FrozenPolicy,
    optimizer_steps: int,
    options: LossOptions | None = None,
    lr: float = 3e-3,
) -> None:
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
    for step in range(optimizer_steps):
        loss = draft_loss(head, row_of_step(step), policy, options)
        optimizer.zero_grad()
        (loss.total / loss.weight).backward()
        optimizer.step()


@torch.no_grad()
def sample(
    model: Any, prompts: list[list[int]], new_tokens: int, seed: int = 0, vocab_limit: int | None = None
) -> list[list[int]]:
    """Rollouts at temperature 1, of prompts of equal length; token ids from `vocab_limit` on are never sampled."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(prompts)
    for _ in range(new_tokens):
        chances = F.softmax(model(tokens).logits[:, -1, :vocab_limit].float(), dim=-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
    result: list[list[int]] = tokens.tolist()
    return result
