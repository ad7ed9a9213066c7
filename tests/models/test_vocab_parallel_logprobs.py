"""Log-probs and entropies from logits: values and gradients against plain PyTorch."""

import pytest
import torch

from megatron_rl.models.vocab_parallel_logprobs import token_logprobs


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def plain(logits: torch.Tensor, tokens: torch.Tensor, temperature: float, limit: int):
    scores = (logits[:, :limit].float() / temperature).log_softmax(-1)
    return scores.gather(1, tokens[:, None])[:, 0], -(scores.exp() * scores).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize(("width", "limit"), [(99, 97), (64, 64)])
def test_values_and_gradients_equal_plain_pytorch(dtype, rows, width, limit, group):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, width, generator=generator) * 4).to(dtype)
    tokens = torch.randint(0, limit, (rows,), generator=generator)
    upstream = torch.randn(2, rows, generator=generator)
    results = []
    for function in (lambda x: token_logprobs(x, tokens, 0.7, limit, group), lambda x: plain(x, tokens, 0.7, limit)):
        leaf = logits.clone().requires_grad_()
        values = function(leaf)
        (values[0] * upstream[0] + values[1] * upstream[1]).sum().backward()
        results.append((*values, leaf.grad))
    for ours, truth in zip(*results, strict=True):
        tolerance = 1e-5 if ours.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(ours, truth, atol=tolerance, rtol=tolerance)
    assert (results[0][2][:, limit:] == 0).all(), "ids past the limit must get no gradient"


def test_no_rows_give_no_values(group):
    logits = torch.zeros(0, 8, requires_grad=True)
    logprobs, entropies = token_logprobs(logits, torch.zeros(0, dtype=torch.int64), 1.0, 8, group)
    (logprobs.sum() + entropies.sum()).backward()
    assert logprobs.shape == entropies.shape == (0,)


def test_a_large_logit_past_the_limit_changes_nothing(group):
    logits = torch.randn(5, 10)
    tokens = torch.arange(5)
    before = token_logprobs(logits, tokens, 1.0, 8, group)[0]
    logits[:, 9] = 1e4
    torch.testing.assert_close(token_logprobs(logits, tokens, 1.0, 8, group)[0], before)
