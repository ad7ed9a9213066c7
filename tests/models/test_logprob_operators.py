"""The native log-prob operators against a float64 reference and their torch twins, and what both promise."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rl.models import vocab_parallel_logprobs as module
from megatron_rl.models.vocab_parallel_logprobs import gradient_in_torch, relative_to, sums_in_torch, token_logprobs
from rollout.native import load_operators
from tests.capabilities import CAPABILITY, available

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UPSTREAM = [(True, False), (False, True), (True, True), (False, False)]
OPERATORS = torch.ops.megatron_rl


@contextmanager
def using(capability: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CAPABILITY, capability)
        yield


CAPABILITIES = available(
    lambda: OPERATORS.token_logprob_sums(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), 1.0, 1)
)


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with each instruction set of this machine."""
    monkeypatch.setenv(CAPABILITY, request.param)
    return request.param


def make_logits(rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator) * 4).to(dtype)


def make_tokens(rows: int, valid: int) -> Tensor:
    """Tokens of the slice, but every fourth on one of its neighbours."""
    tokens = torch.randint(0, valid, (rows,), generator=torch.Generator().manual_seed(1))
    tokens[1::8] = -3
    tokens[5::8] = valid
    return tokens


def values(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled logit minus normalizer, and entropy, in float64."""
    maxima, sums = maxima.double(), sums.double()
    return sums[2] - maxima - sums[0].log(), sums[0].log() - sums[1] / sums[0]


class Exact:
    """Everything in float64, by definition; `gradients` are those of a log-prob and of an entropy."""

    def __init__(self, logits: Tensor, tokens: Tensor, temperature: float, valid: int) -> None:
        scaled = logits[:, :valid].double() / temperature
        self.normalizers = scaled.logsumexp(-1)
        logs = scaled - self.normalizers[:, None]
        probabilities = logs.exp()
        self.entropies = -(probabilities * logs).sum(-1)
        rows = ((tokens >= 0) & (tokens < valid)).nonzero()[:, 0]
        self.picked = torch.zeros(len(logits), dtype=torch.float64)
        self.picked[rows] = scaled[rows, tokens[rows]]
        for_entropies = -probabilities * (logs + self.entropies[:, None]) / temperature
        for_logprobs = probabilities / -temperature
        for_logprobs[rows, tokens[rows]] += 1 / temperature
        padding = (0, logits.shape[1] - valid)
        self.gradients = [torch.nn.functional.pad(part, padding) for part in (for_logprobs, for_entropies)]


@pytest.mark.parametrize("width", [1, 7, 64, 99, 4097, 32_000])
@pytest.mark.parametrize("rows", [1, 37, 200])
@pytest.mark.parametrize(("temperature", "all_valid"), [(0.7, False), (1.0, True)])
def test_the_operators_are_exact(rows: int, width: int, temperature: float, all_valid: bool) -> None:
    valid = width if all_valid else max(width - width // 9 - 2, 1)
    tokens = make_tokens(rows, valid)
    for dtype in DTYPES:
        logits = make_logits(rows, width, dtype)
        exact = Exact(logits, tokens, temperature, valid)
        for name in CAPABILITIES:
            with using(name):
                check_values(exact, *OPERATORS.token_logprob_sums(logits, tokens, temperature, valid))
                for given in UPSTREAM if rows * width < 3e5 else UPSTREAM[2:3]:
                    check_gradient(exact, logits, tokens, temperature, valid, given)


def check_values(exact: Exact, maxima: Tensor, sums: Tensor) -> None:
    logprobs, entropies = values(maxima, sums)
    torch.testing.assert_close(logprobs, exact.picked - exact.normalizers, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropies, exact.entropies, atol=1e-5, rtol=0)


def check_gradient(
    exact: Exact, logits: Tensor, tokens: Tensor, temperature: float, valid: int, given: tuple[bool, bool]
) -> None:
    upstream = torch.randn(2, len(logits), generator=torch.Generator().manual_seed(2))
    some = [part if wanted else None for part, wanted in zip(upstream, given, strict=True)]
    expected = torch.zeros(logits.shape, dtype=torch.float64)
    for part, gradient in zip(some, exact.gradients, strict=True):
        if part is not None:
            expected.addcmul_(part[:, None], gradient)
    common = exact.normalizers.float(), exact.entropies.float()
    ours = OPERATORS.token_logprob_gradient(logits, tokens, *common, *some, temperature, valid)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}
    assert ours.dtype == logits.dtype and not ours[:, valid:].any()
    allowed = expected.abs().mul_(rounding[logits.dtype]).add_(1e-5)
    assert (expected.sub_(ours).abs_() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e5])
def test_gradients_are_rounded_once_to_the_nearest(dtype: torch.dtype, scale: float, capability: str) -> None:
    # From denormal numbers to those that overflow float16; half of all columns are past the last whole vector.
    logits = make_logits(300, 31, dtype)
    tokens = make_tokens(300, 31)
    exact = Exact(logits, tokens, 1.0, 31)
    upstream = torch.randn(2, 300, generator=torch.Generator().manual_seed(3)) * scale
    rest = tokens, exact.normalizers.float(), exact.entropies.float(), *upstream, 1.0, 31
    whole = OPERATORS.token_logprob_gradient(logits.float(), *rest)
    assert torch.equal(OPERATORS.token_logprob_gradient(logits, *rest), whole.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", UPSTREAM)
def test_the_torch_functions_agree(
    dtype: torch.dtype, given: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 500)  # several chunks, the last one short
    logits, tokens = make_logits(37, 99, dtype), make_tokens(37, 90)
    logits[3, 5:20] = -torch.inf
    logits[4, :90] = -torch.inf
    tokens[3] = 7
    ours, theirs = (f(logits, tokens, 0.7, 90) for f in (OPERATORS.token_logprob_sums, sums_in_torch))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert ours[0][4] == -torch.inf and not ours[1][:2, 4].any()
    common = logits[:, :90].float().div(0.7).logsumexp(-1), values(*theirs)[1].float()
    common[0][4], common[1][4] = 3.0, 1.0  # of the other slices
    upstream = torch.randn(2, 37, generator=torch.Generator().manual_seed(2))
    some = [part if wanted else None for part, wanted in zip(upstream, given, strict=True)]
    arguments = logits, tokens, *common, *some, 0.7, 90
    torch.testing.assert_close(
        OPERATORS.token_logprob_gradient(*arguments),
        gradient_in_torch(*arguments),
        atol=1e-5,
        rtol=1e-5 if dtype == torch.float32 else 1e-2,
    )


def test_devices_without_a_native_operator_use_the_torch_functions() -> None:
    logits, tokens = torch.zeros(5, 9, device="meta"), torch.zeros(5, dtype=torch.int64, device="meta")
    maxima, sums = OPERATORS.token_logprob_sums(logits, tokens, 1.0, 0)
    assert maxima.shape == (5,) and sums.shape == (3, 5) and maxima.device.type == "meta"
    # The native operator refuses a float64 vector, the other does not look.
    assert OPERATORS.token_logprob_gradient(logits, tokens, maxima.double(), maxima, None, None, 1.0, 0).shape == (5, 9)


def test_offsets_of_the_logits_cost_the_entropy_no_accuracy(capability: str) -> None:
    logits, tokens = make_logits(20, 5000), torch.zeros(20, dtype=torch.int64)
    logits = (logits * 64).round() / 64  # the sum with 1000 is exact
    exact = Exact(logits, tokens, 1.0, 5000)
    for function in (OPERATORS.token_logprob_sums, sums_in_torch):
        entropies = values(*function(logits + 1000, tokens, 1.0, 5000))[1]
        torch.testing.assert_close(entropies, exact.entropies, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_lie_anywhere_in_memory(dtype: torch.dtype, capability: str) -> None:
    logits, tokens = make_logits(6, 1001, dtype), make_tokens(6, 1001)
    room = torch.full((6, 1500), torch.nan, dtype=dtype)
    normalizers, entropies, upstream = torch.full((6,), 12.0), torch.ones(6), torch.ones(6)
    calls = [
        lambda x: OPERATORS.token_logprob_sums(x, tokens, 0.9, 1001)[1],
        lambda x: OPERATORS.token_logprob_gradient(x, tokens, normalizers, entropies, upstream, upstream, 0.9, 1001),
    ]
    for start in (0, 1, 3, 499):
        view = room[:, start : start + 1001]
        view.copy_(logits)
        for call in calls:
            assert torch.equal(call(view), call(logits))
        room.fill_(torch.nan)


def test_threads_do_not_change_a_bit() -> None:
    logits, tokens = make_logits(3, 100_000), torch.tensor([5, 99_999, -1])
    upstream, results, before = torch.ones(3), [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            maxima, sums = OPERATORS.token_logprob_sums(logits, tokens, 0.9, 99_999)
            common = maxima + sums[0].log(), upstream, upstream, upstream
            gradient = OPERATORS.token_logprob_gradient(logits, tokens, *common, 0.9, 99_999)
            results.append((maxima, sums, gradient))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def run_shards(shards: list[Tensor], tokens: Tensor, limit: int, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """token_logprobs of every shard, and the gradient of their weighted sum, with threads as the ranks of a group."""
    results: list[list[Tensor]] = [[] for _ in shards]
    tensors: list[Tensor | None] = [None for _ in shards]
    barrier = threading.Barrier(len(shards), timeout=60)

    def reduce(tensor: Tensor, operation: object, rank: int) -> None:
        tensors[rank] = tensor.clone()
        barrier.wait()
        whole = torch.stack([part for part in tensors if part is not None])
        barrier.wait()
        tensor.copy_(whole.amax(0) if operation == torch.distributed.ReduceOp.MAX else whole.sum(0))

    def run(rank: int) -> None:
        leaf = shards[rank].clone().requires_grad_()
        logprobs, entropies = token_logprobs(leaf, tokens, 0.7, limit, rank)  # type: ignore[arg-type]
        (logprobs * 0.3 - entropies * 0.2).sum().backward()
        results[rank] = [logprobs.detach(), entropies.detach(), leaf.grad]

    monkeypatch.setattr(module, "_reduce", reduce)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group)
    threads = [threading.Thread(target=partial(run, rank)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("limit", [150, 190])
def test_shards_together_equal_the_whole_vocabulary(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four shards of 50: of the last some or no column counts; in row 0 the first has nothing but -inf.
    logits, tokens = make_logits(40, 200), torch.arange(40) * 3 + 20
    logits[0, :50] = -torch.inf
    tokens[0] = 60
    leaf = logits.clone().requires_grad_()
    scores = (leaf[:, :limit] / 0.7).log_softmax(-1)
    logprobs = scores.gather(1, tokens[:, None])[:, 0]
    entropies = -(scores.exp() * scores.clamp_min(-1e4)).sum(-1)
    (logprobs * 0.3 - entropies * 0.2).sum().backward()
    results = run_shards(list(logits.split(50, 1)), tokens, limit, monkeypatch)
    for result in results:
        torch.testing.assert_close(result[:2], [logprobs.detach(), entropies.detach()], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([result[2] for result in results], 1), leaf.grad, atol=1e-6, rtol=1e-5)


def test_sums_of_an_empty_shard_vanish_beside_another() -> None:
    maxima, own = torch.tensor([3.0, 3.0]), torch.tensor([-torch.inf, 3.0])
    sums = torch.tensor([[0.0, 2.0], [0.0, -1.0], [0.0, 5.0]])
    assert torch.equal(relative_to(maxima, own, sums), sums)


def both_ways(logits: Tensor, tokens: Tensor, valid: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Log-probs, entropies and gradient by the native operators and by the torch functions."""
    ones = torch.ones(len(logits))
    native = OPERATORS.token_logprob_sums, OPERATORS.token_logprob_gradient
    for sums_of, gradient_of in (native, (sums_in_torch, gradient_in_torch)):
        maxima, sums = sums_of(logits, tokens, 1.0, valid)
        sums = relative_to(maxima, maxima, sums)
        logprobs, entropies = sums[2] - maxima - sums[0].log(), sums[0].log() - sums[1] / sums[0]
        gradient = gradient_of(logits, tokens, maxima + sums[0].log(), entropies, ones, ones, 1.0, valid)
        yield logprobs, entropies, gradient


@pytest.mark.parametrize("width", [10, 99, 9000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_excluded_tokens_count_nothing(width: int, dtype: torch.dtype, capability: str) -> None:
    logits = make_logits(4, width, dtype)
    kept = torch.arange(0, width, 3)
    masked = torch.full_like(logits, -torch.inf)
    masked[:, kept] = logits[:, kept]
    tokens = torch.tensor([0, 3, 6, 1])  # the last is excluded itself
    exact = Exact(logits[:, kept], tokens // 3, 1.0, len(kept))
    for logprobs, entropies, gradient in both_ways(masked, tokens, width):
        assert logprobs[3] == -torch.inf
        expected = exact.picked - exact.normalizers
        torch.testing.assert_close(logprobs[:3].double(), expected[:3], atol=1e-5, rtol=0)
        torch.testing.assert_close(entropies.double(), exact.entropies, atol=1e-5, rtol=0)
        assert gradient.isfinite().all()
        hits = torch.zeros(4, width, dtype=dtype).index_put(
            (torch.tensor([3]), torch.tensor([1])), torch.ones((), dtype=dtype)
        )
        excluded = torch.ones(width, dtype=torch.bool).index_fill(0, kept, False)
        assert torch.equal(gradient[:, excluded], hits[:, excluded])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("position", [0, 14, 98, 4999, 19_998])
def test_nan_and_infinity_make_nan_in_their_row_alone(wrong: float, position: int, capability: str) -> None:
    for dtype in DTYPES:
        for base in (make_logits(3, 20_000, dtype), torch.full((3, 20_000), -torch.inf, dtype=dtype)):
            base[:, 7] = 1.0
            base[1, position] = wrong
            base[:, 19_999] = wrong  # past the limit
            for logprobs, entropies, gradient in both_ways(base, torch.tensor([7, 7, -1]), 19_999):
                assert logprobs.isnan().tolist() == entropies.isnan().tolist() == [False, True, False]
                assert gradient[1, :19_999].isnan().all() and gradient[[0, 2]].isfinite().all()
                assert not gradient[:, 19_999].any()


def test_a_row_of_nothing_is_nan(capability: str) -> None:
    for logits in (torch.full((2, 50), -torch.inf), torch.full((2, 50), torch.nan)):
        for logprobs, entropies, _ in both_ways(logits, torch.tensor([3, -1]), 50):
            assert logprobs.isnan().all() and entropies.isnan().all()


def test_empty_slices_and_batches(capability: str) -> None:
    for rows, width, valid in ((3, 8, 0), (3, 0, 0), (0, 8, 8), (0, 0, 0)):
        logits, tokens = torch.ones(rows, width), torch.zeros(rows, dtype=torch.int64)
        for function in (OPERATORS.token_logprob_sums, sums_in_torch):
            maxima, sums = function(logits, tokens, 1.0, valid)
            assert torch.equal(maxima, torch.full((rows,), -torch.inf if valid == 0 else 1.0))
            assert torch.equal(sums, torch.zeros(3, rows))
        for function in (OPERATORS.token_logprob_gradient, gradient_in_torch):
            gradient = function(logits, tokens, maxima, maxima, maxima, maxima, 1.0, valid)
            assert torch.equal(gradient, torch.zeros(rows, width))


BROKEN = {
    "logits must be two-dimensional": {"logits": torch.zeros(7)},
    "logits must be contiguous in the last dimension": {"logits": torch.zeros(9, 7).t()},
    "logits must be float32, bfloat16 or float16": {"logits": torch.zeros(7, 9).double()},
    "tokens must be one-dimensional with 7 entries": {"tokens": torch.zeros(6, dtype=torch.int64)},
    "tokens must be int64": {"tokens": torch.zeros(7, dtype=torch.int32)},
    "tokens must be contiguous": {"tokens": torch.zeros(14, dtype=torch.int64)[::2]},
    "temperature must be positive and finite": {"temperature": 0.0},
    "valid must be between 0 and the number of columns": {"valid": 10},
    "normalizers must be float32": {"normalizers": torch.zeros(7).double()},
    "entropies must be one-dimensional with 7": {"entropies": torch.zeros(8)},
    "for_logprobs must be contiguous": {"for_logprobs": torch.zeros(1).expand(7)},
    "for_entropies must be float32": {"for_entropies": torch.zeros(7).bfloat16()},
}


@pytest.mark.parametrize("message", BROKEN)
def test_wrong_arguments_are_named(message: str) -> None:
    call = {"logits": torch.zeros(7, 9), "tokens": torch.zeros(7, dtype=torch.int64), "temperature": 1.0, "valid": 9}
    vectors = ("normalizers", "entropies", "for_logprobs", "for_entropies")
    whole = call | {name: torch.zeros(7) for name in vectors}
    OPERATORS.token_logprob_gradient(**whole)
    with pytest.raises(ValueError, match=f"token_logprob_gradient: {message}"):
        OPERATORS.token_logprob_gradient(**whole | BROKEN[message])
    if BROKEN[message].keys() <= call.keys():
        with pytest.raises(ValueError, match=f"token_logprob_sums: {message}"):
            OPERATORS.token_logprob_sums(**call | BROKEN[message])


@pytest.mark.parametrize("temperature", [-1.0, torch.nan, torch.inf])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        OPERATORS.token_logprob_sums(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), temperature, 4)


def test_a_library_that_was_not_built_says_how_to_build_it() -> None:
    with pytest.raises(ImportError, match="megatron_rl/models/_nothing.so has not been built: run `make setup`"):
        load_operators(Path(module.__file__).with_name("_nothing.so"))
