"""The native verifier against its PyTorch reference, and what both promise."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rollout.native import load_operators
from rollout.sampling import verify
from rollout.sampling.gumbel_noise import coupled_sample
from rollout.sampling.verify import Verified, raise_for_status, verify_tokens, verify_tokens_reference
from tests.capabilities import CAPABILITY, available
from tests.rollout.sampling.verify_cases import (
    MIXED_DRAFTS,
    Call,
    make_call,
    mixed_call,
    shapes_of_logits,
    single_rows,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CAPABILITIES = available(lambda: verify_tokens(**single_rows(torch.zeros(1, 1))))


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with each instruction set of this machine."""
    monkeypatch.setenv(CAPABILITY, request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_equal(actual: Verified, expected: Verified) -> None:
    assert torch.equal(actual.tokens, expected.tokens)
    assert torch.equal(actual.num_emitted, expected.num_emitted)
    torch.testing.assert_close(actual.logprobs, expected.logprobs, atol=1e-5, rtol=1e-6)


def assert_identical(actual: Verified, expected: Verified) -> None:
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def with_every_capability(call: Call) -> Iterator[Verified]:
    for name in CAPABILITIES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(CAPABILITY, name)
            yield verify_tokens(**call)


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 16, 1000, 4096, 4097, 32_001, 152_064])
def test_the_operator_equals_the_reference(vocab: int, dtype: torch.dtype, lenient: bool) -> None:
    for seed in range(1 if vocab > 10_000 else 5):
        call = mixed_call(vocab, dtype, lenient, seed)
        expected = verify_tokens_reference(**call)
        for result in with_every_capability(call):
            assert_equal(result, expected)


@pytest.mark.parametrize("vocab", [33, 4101, 8192])
def test_no_shape_of_logits_makes_the_pruning_miss_the_winner(vocab: int, capability: str) -> None:
    for name, row in shapes_of_logits(vocab).items():
        for dtype in DTYPES:
            logits = row.to(dtype).expand(24, vocab).contiguous()
            if not logits.float().amax().isfinite():
                continue  # does not fit into float16
            call = single_rows(logits, seed=len(name))
            assert_equal(verify_tokens(**call), verify_tokens_reference(**call))


@pytest.mark.parametrize("temperature", [1e-4, 0.05, 100.0, 1e30])
def test_extreme_temperatures(temperature: float, capability: str) -> None:
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)) * 4
    call = single_rows(logits, temperature)
    assert_equal(verify_tokens(**call), verify_tokens_reference(**call))


def test_logprobs_are_exact_for_a_vocabulary_of_256k(capability: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(262_144, generator=generator) * scale for scale in (0.0, 0.1, 3.0, 10.0)]
    logits = torch.stack([*rows, rows[2] + 500, rows[2] - 500])
    result = verify_tokens(**single_rows(logits))
    exact = logits.double().log_softmax(-1).gather(1, result.tokens.long())
    torch.testing.assert_close(result.logprobs.double(), exact, atol=1e-5, rtol=0)


def test_greedy_takes_the_lowest_id_among_equals(capability: str) -> None:
    logits = torch.zeros(3, 9000)
    logits[0, [4090, 5000, 8999]] = 2.0
    logits[1, 8999] = 2.0
    result = verify_tokens(**single_rows(logits, temperature=0.0))
    assert result.tokens[:, 0].tolist() == [4090, 8999, 0]
    torch.testing.assert_close(result.logprobs[2, 0].item(), -math.log(9000))


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_the_batch_change_a_bit(threads: Callable[[int], None], dtype: torch.dtype) -> None:
    call = mixed_call(40_000, dtype, lenient=True)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        results.append(verify_tokens(**call))
    for result in results[1:]:
        assert_identical(result, results[0])
    for request in (0, 2, 5):
        start, end = call["cu_rows"][request : request + 2].tolist()
        alone = {name: call[name][request : request + 1] for name in ("temperature", "seeds", "positions", "lenience")}
        drafts = slice(start - request, end - request - 1)
        alone |= {name: call[name][drafts] for name in ("draft_ids", "draft_logprobs")}
        single = verify_tokens(
            call["logits"][start:end],
            torch.tensor([0, end - start], dtype=torch.int32),
            max_rows=call["max_rows"],
            **alone,
        )
        assert_identical(single, Verified(*(output[request : request + 1] for output in results[0])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_anywhere_in_memory(dtype: torch.dtype, capability: str) -> None:
    call = mixed_call(1001, dtype)
    room = torch.full((len(call["logits"]), 1500), torch.nan, dtype=dtype)
    for start in (0, 1, 3, 499):
        view = room[:, start : start + 1001]
        view.copy_(call["logits"])
        assert_identical(verify_tokens(**call | {"logits": view}), verify_tokens(**call))
        room.fill_(torch.nan)


def test_all_rows_may_be_one_row_in_memory() -> None:
    row = torch.randn(1, 300)
    call = single_rows(row.expand(50, 300).contiguous())
    assert_identical(verify_tokens(**call | {"logits": row.expand(50, 300)}), verify_tokens(**call))


def test_an_empty_batch_emits_nothing() -> None:
    result = verify_tokens(**make_call(torch.zeros(0, 10), [], []))
    assert result.tokens.shape == (0, 1) and result.num_emitted.shape == (0,) and result.logprobs.shape == (0, 1)


def test_drafts_change_how_many_tokens_come_out_but_not_which() -> None:
    logits = torch.randn(40, 2000) * 2
    call = make_call(logits, [39], [1.0], right=0.9)
    plain, plain_logprobs = coupled_sample(
        logits, call["seeds"].expand(40), call["positions"] + torch.arange(40), torch.ones(40)
    )
    right = int((plain[:39] == call["draft_ids"]).long().cumprod(0).sum())
    result = verify_tokens(**call)
    assert result.num_emitted.tolist() == [right + 1]
    assert result.tokens[0].tolist() == plain[: right + 1].tolist() + [-1] * (39 - right)
    torch.testing.assert_close(result.logprobs[0, : right + 1], plain_logprobs[: right + 1])
    assert not result.logprobs[0, right + 1 :].any()


def test_rows_after_the_first_difference_are_not_read() -> None:
    call = make_call(torch.randn(4, 100), [3], [1.0], right=1.0)
    call["draft_ids"][1] = (call["draft_ids"][1] + 1) % 100
    call["logits"][2:] = torch.nan
    assert verify_tokens(**call).num_emitted.tolist() == [2]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_tokens_are_distributed_as_the_softmax(temperature: float) -> None:
    draws, vocab = 200_000, 12
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 1.5
    call = single_rows(logits.expand(draws, vocab), temperature, seed=5)
    counts = verify_tokens(**call).tokens[:, 0].long().bincount(minlength=vocab)
    expected = (logits / temperature).softmax(0) * draws
    assert ((counts - expected) ** 2 / expected).sum().item() < 31.3  # 11 degrees of freedom, p = 0.001


def lenient_call(lenience: float, then: float | Tensor, draws: int, draft: int = 0) -> tuple[Call, Tensor]:
    """`draws` requests with one draft token each, over the same logits; also the log-softmax of these."""
    logits = torch.tensor([1.0, 0.5, 0.0, -1.0, -torch.inf])
    call = make_call(logits.expand(2 * draws, 5), [1] * draws, [1.0] * draws)
    call["draft_ids"] = torch.full((draws,), draft, dtype=torch.int32)
    call["draft_logprobs"] = torch.as_tensor(then, dtype=torch.float32).expand(draws).contiguous()
    call["lenience"] = torch.full((draws,), lenience)
    return call, logits.log_softmax(0)


@pytest.mark.parametrize("lenience", [-0.4, 0.0, 0.3])
def test_lenient_drafts_are_accepted_with_the_probability_of_the_rule(lenience: float) -> None:
    draws, then = 100_000, -0.6
    call, logprobs = lenient_call(lenience, then, draws)
    result = verify_tokens(**call)
    probability = min(1.0, math.exp(lenience + logprobs[0].item() - then))
    accepted = (result.num_emitted == 2).double().mean().item()
    assert accepted == pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / draws))


def test_acceptance_is_independent_of_the_sampled_token() -> None:
    draws = 100_000
    call, logprobs = lenient_call(0.0, -0.5, draws)
    result = verify_tokens(**call)
    rejected = result.tokens[result.num_emitted == 1, 0].long()
    expected = logprobs[:4].exp() * len(rejected)
    counts = rejected.bincount(minlength=4)
    assert ((counts - expected) ** 2 / expected).sum().item() < 16.3  # 3 degrees of freedom, p = 0.001


def test_infinite_lenience_accepts_all_or_nothing_but_never_a_masked_token() -> None:
    for then in (-0.5, -torch.inf):
        accepted = verify_tokens(**lenient_call(torch.inf, then, 200)[0])
        assert (accepted.num_emitted == 2).all() and (accepted.tokens[:, 0] == 0).all()
        rejected = verify_tokens(**lenient_call(-torch.inf, then, 200)[0])
        assert (rejected.num_emitted == 1).all()
        masked = verify_tokens(**lenient_call(torch.inf, then, 200, draft=4)[0])
        assert (masked.num_emitted == 1).all() and (masked.tokens != 4).all()


def test_an_accepted_draft_has_its_present_logprob() -> None:
    call, logprobs = lenient_call(torch.inf, -3.0, 10, draft=3)
    result = verify_tokens(**call)
    torch.testing.assert_close(result.logprobs[:, 0], logprobs[3].expand(10))


def test_lenience_nan_means_the_coupled_rule_and_greedy_accepts_the_argmax_alone() -> None:
    call = mixed_call(500, torch.float32)
    coupled = verify_tokens(**call)
    drafts, batch = len(call["draft_ids"]), len(MIXED_DRAFTS)
    nan = {"draft_logprobs": torch.full((drafts,), torch.nan), "lenience": torch.full((batch,), torch.nan)}
    assert_identical(verify_tokens(**call | nan), coupled)
    greedy = call | {"temperature": torch.zeros(batch)}
    generous = {"draft_logprobs": torch.full((drafts,), -9.0), "lenience": torch.full((batch,), torch.inf)}
    assert_identical(verify_tokens(**greedy | generous), verify_tokens(**greedy))


@pytest.mark.parametrize("wrong", ["seeds", "positions", "temperature"])
def test_a_reference_with_another_key_differs(wrong: str) -> None:
    # The comparison above would notice a wrong noise key or temperature.
    call = mixed_call(1000, torch.float32)
    other = call | {wrong: call[wrong] + 1}
    assert not torch.equal(verify_tokens(**call).tokens, verify_tokens_reference(**other).tokens)


def changed(name: str, change: Callable[[Tensor], object]) -> Callable[[Call], Call]:
    """The call with a copy of one argument changed: in place, or by what `change` returns."""

    def apply(call: Call) -> Call:
        value = call[name].clone()
        result = change(value)
        return call | {name: result if isinstance(result, Tensor) else value}

    return apply


def put(index: object, value: float) -> Callable[[Tensor], None]:
    return lambda tensor: tensor.__setitem__(index, value)


BROKEN: dict[str, Callable[[Call], Call]] = {
    "logits row 3 of request 0 holds NaN": changed("logits", put((3, 77), torch.nan)),
    "logits row 0 of request 1 holds NaN": changed("logits", put((4, slice(1, None)), torch.nan)),
    r"logits row 2 of request 0 holds \+inf": changed("logits", put((2, 99), torch.inf)),
    "logits row 0 of request 0 has only -inf": changed("logits", put(0, -torch.inf)),
    "draft_ids: draft 1 of request 0 is negative": changed("draft_ids", put(1, -1)),
    "draft_ids: draft 0 of request 2 .* not below the vocabulary": changed("draft_ids", put(3, 100)),
    "temperature of request 1 must be finite": changed("temperature", put(1, -0.5)),
    "temperature of request 2 must be finite": changed("temperature", put(2, torch.nan)),
    "temperature of request 0 must be finite": changed("temperature", put(0, torch.inf)),
    "cu_rows must start at 0, rise": changed("cu_rows", put(0, 1)),
    "cu_rows must .* rise": changed("cu_rows", put(1, 6)),
    "cu_rows must .* end at the number of logits rows": changed("cu_rows", put(3, 6)),
    "draft_logprobs: draft 2 of request 0": changed("draft_logprobs", put(2, torch.nan)),
    "draft_logprobs: draft 0 of request 2": changed("draft_logprobs", put(3, torch.inf)),
    "max_rows is smaller than the number of rows of request 0": lambda call: call | {"max_rows": 3},
    "max_rows must be at least 1": lambda call: call | {"max_rows": 0},
    "logits must be two-dimensional": changed("logits", lambda x: x[0]),
    "logits must have at least one column": changed("logits", lambda x: x[:, :0]),
    "logits must be contiguous in the last": changed("logits", lambda x: x.t().contiguous().t()),
    "logits must be float32, bfloat16 or float16": changed("logits", lambda x: x.double()),
    "cu_rows must be one-dimensional": changed("cu_rows", lambda x: x[None]),
    "cu_rows must be int32": changed("cu_rows", lambda x: x.long()),
    "cu_rows has more requests": changed("cu_rows", lambda x: torch.arange(12, dtype=torch.int32)),
    "cu_rows has no request": changed("cu_rows", lambda x: x[:1]),
    "draft_ids must be one-dimensional with 4 entries": changed("draft_ids", lambda x: x[:3]),
    "draft_ids must be int32": changed("draft_ids", lambda x: x.long()),
    "temperature must be one-dimensional with 3": changed("temperature", lambda x: x[:2]),
    "temperature must be float32": changed("temperature", lambda x: x.double()),
    "temperature must be contiguous": changed("temperature", lambda x: torch.ones(6)[::2]),
    "seeds must be int64": changed("seeds", lambda x: x.int()),
    "positions must be int64": changed("positions", lambda x: x.float()),
    "lenience must be float32": changed("lenience", lambda x: x.double()),
    "draft_logprobs and lenience must be given together": lambda call: call | {"lenience": None},
    "lenience must be given together": lambda call: call | {"draft_logprobs": None},
}


@pytest.mark.parametrize("message", BROKEN)
def test_wrong_arguments_are_named(message: str) -> None:
    call = make_call(torch.randn(7, 100, generator=torch.Generator().manual_seed(0)), [3, 0, 1], [1.0] * 3, right=1.0)
    call |= {"draft_logprobs": torch.full((4,), -9.0), "lenience": torch.full((3,), torch.inf)}
    verify_tokens(**call)
    with pytest.raises(ValueError, match=message):
        verify_tokens(**BROKEN[message](call))


def test_logits_that_overflow_when_scaled_are_refused_and_masked_when_negative() -> None:
    logits = torch.tensor([[3e38, 0.0, 1.0]])
    with pytest.raises(ValueError, match="overflows when divided by temperature"):
        verify_tokens(**single_rows(logits, 0.5))
    assert verify_tokens(**single_rows(-logits, 0.5)).tokens.item() != 0


def test_nan_is_found_wherever_it_is(capability: str) -> None:
    for dtype in DTYPES:
        for token in (0, 15, 16, 4095, 4096, 5000):
            for background in (0.0, -torch.inf):
                for temperature in (0.0, 1.0):
                    logits = torch.full((1, 5001), background)
                    call = single_rows(logits.index_fill(1, torch.tensor([100]), 1.0).to(dtype), temperature)
                    call["logits"][0, token] = torch.nan
                    with pytest.raises(ValueError, match="row 0 of request 0 holds NaN"):
                        verify_tokens(**call)


def test_a_negative_num_emitted_is_the_error_of_that_request() -> None:
    raise_for_status(torch.tensor([1, 5, 2], dtype=torch.int32))
    with pytest.raises(ValueError, match="logits row 2 of request 1 holds NaN"):
        raise_for_status(torch.tensor([4, -(1 + 16 * 2)], dtype=torch.int32))


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CAPABILITY, "avx1024")
    with pytest.raises(ValueError, match='MEGATRON_RL_CPU_CAPABILITY is "avx1024"; use avx512, avx2 or portable'):
        verify_tokens(**single_rows(torch.zeros(1, 4)))


def test_a_library_that_was_not_built_says_how_to_build_it() -> None:
    with pytest.raises(ImportError, match="rollout/sampling/_nothing.so has not been built: run `make setup`"):
        load_operators(Path(verify.__file__).with_name("_nothing.so"))


def test_the_operator_has_shapes_without_data() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = mixed_call(50, torch.bfloat16, lenient=True)
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) if isinstance(value, Tensor) else value for key, value in call.items()}
        shapes = [(output.shape, output.dtype) for output in verify_tokens(**fake)]
    assert shapes == [(output.shape, output.dtype) for output in verify_tokens(**call)]
