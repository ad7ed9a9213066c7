"""The verifier's CUDA kernels: the same tokens as on CPU, and the reference's log-probabilities."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rollout.sampling.verify import Verified, raise_for_status, verify_tokens, verify_tokens_reference
from tests.rollout.sampling.verify_cases import Call, make_call, mixed_call, shapes_of_logits, single_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(call: Call) -> Call:
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in call.items()}


def verify_on_gpu(call: Call) -> Verified:
    result = Verified(*(output.cpu() for output in verify_tokens(**on_gpu(call))))
    raise_for_status(result.num_emitted)
    return result


def assert_equal(actual: Verified, expected: Verified) -> None:
    assert torch.equal(actual.tokens, expected.tokens)
    assert torch.equal(actual.num_emitted, expected.num_emitted)
    torch.testing.assert_close(actual.logprobs, expected.logprobs, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 16, 1000, 8191, 8192, 8193, 32_001, 152_064, 262_144])
def test_cuda_equals_the_cpu_and_the_reference(vocab: int, dtype: torch.dtype, lenient: bool) -> None:
    for seed in range(1 if vocab > 10_000 else 5):
        call = mixed_call(vocab, dtype, lenient, seed)
        result = verify_on_gpu(call)
        assert_equal(result, verify_tokens(**call))
        assert_equal(result, verify_tokens_reference(**call))


@pytest.mark.parametrize("vocab", [33, 4101, 8193, 100_000])
def test_no_shape_of_logits_makes_the_pruning_miss_the_winner(vocab: int) -> None:
    for name, row in shapes_of_logits(vocab).items():
        for dtype in DTYPES:
            logits = row.to(dtype).expand(24, vocab).contiguous()
            if logits.float().amax().isfinite():
                call = single_rows(logits, seed=len(name))
                assert_equal(verify_on_gpu(call), verify_tokens(**call))


@pytest.mark.parametrize("temperature", [0.0, 1e-4, 0.05, 100.0, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.randn(64, 50_000, generator=torch.Generator().manual_seed(0)) * 4
    call = single_rows(logits, temperature)
    assert_equal(verify_on_gpu(call), verify_tokens(**call))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_anywhere_in_memory(dtype: torch.dtype) -> None:
    call = on_gpu(mixed_call(10_001, dtype))
    expected = verify_tokens(**call)
    room = torch.full((len(call["logits"]), 15_000), torch.nan, dtype=dtype, device="cuda")
    for start in (0, 1, 3, 7, 4999):
        view = room[:, start : start + 10_001]
        view.copy_(call["logits"])
        assert_equal(verify_tokens(**call | {"logits": view}), expected)
        room.fill_(torch.nan)


def test_an_empty_batch_emits_nothing() -> None:
    assert verify_on_gpu(make_call(torch.zeros(0, 10), [], [])).tokens.shape == (0, 1)


def test_a_large_batch_with_many_drafts() -> None:
    logits = torch.randn(500 * 17, 2000, generator=torch.Generator().manual_seed(0)) * 2
    call = make_call(logits, [16] * 500, [1.0] * 500, right=0.95)
    assert_equal(verify_on_gpu(call), verify_tokens(**call))


def test_work_goes_to_the_current_stream() -> None:
    call = on_gpu(mixed_call(32_001, torch.float32))
    expected = verify_tokens(**call)
    logits = call["logits"].clone()
    stream = torch.cuda.Stream()
    call["logits"].fill_(torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whatever does not wait for the copy sees NaN
        call["logits"].copy_(logits)
        result = verify_tokens(**call)
    stream.synchronize()
    assert_equal(result, expected)


def put(name: str, index: object, value: float) -> Callable[[Call], None]:
    return lambda call: call[name].__setitem__(index, value)


BROKEN: dict[str, Callable[[Call], None]] = {
    "logits row 3 of request 0 holds NaN": put("logits", (3, 77), torch.nan),
    r"logits row 2 of request 0 holds \+inf": put("logits", (2, 99), torch.inf),
    "logits row 0 of request 0 has only -inf": put("logits", 0, -torch.inf),
    "draft_ids: draft 1 of request 0": put("draft_ids", 1, -1),
    "draft_ids: draft 0 of request 2": put("draft_ids", 3, 100),
    "temperature of request 1": put("temperature", 1, -0.5),
    "temperature of request 2": put("temperature", 2, torch.nan),
    "cu_rows must start at 0": put("cu_rows", 0, 1),
    "cu_rows must .* rise": put("cu_rows", 1, 6),
    "draft_logprobs: draft 2 of request 0": put("draft_logprobs", 2, torch.nan),
    "max_rows is smaller": lambda call: call.update(max_rows=3),
}


@pytest.mark.parametrize("message", BROKEN)
def test_wrong_data_is_reported_when_the_status_reaches_the_host(message: str) -> None:
    call = make_call(torch.randn(7, 100, generator=torch.Generator().manual_seed(0)), [3, 0, 1], [1.0] * 3, right=1.0)
    call |= {"draft_logprobs": torch.full((4,), -9.0), "lenience": torch.full((3,), torch.inf)}
    BROKEN[message](call)
    result = verify_tokens(**on_gpu(call))
    failed = result.num_emitted < 0
    assert failed.any() and (result.tokens[failed] == -1).all() and not result.logprobs[failed].any()
    with pytest.raises(ValueError, match=message):
        raise_for_status(result.num_emitted)


def test_arguments_on_different_devices_are_named() -> None:
    call = on_gpu(mixed_call(100, torch.float32))
    with pytest.raises(ValueError, match="seeds must be on the device of logits"):
        verify_tokens(**call | {"seeds": call["seeds"].cpu()})
    with pytest.raises(ValueError, match="logits must be on CUDA"):
        verify_tokens(**call | {"logits": call["logits"].cpu()})
