"""The native int8 operators against their reference, bit by bit."""

from dataclasses import replace

import pytest
import torch

from rollout.quantization.int8 import PackedWeight, linear, quantized, reference_linear
from tests.capabilities import require_int8

pytestmark = pytest.mark.usefixtures("int8")


@pytest.fixture(scope="module")
def int8() -> None:
    require_int8()


SIZES = [(64, 4), (96, 160), (1, 1), (65, 33), (200, 1027)]  # out, in


def packed(weight: torch.Tensor) -> PackedWeight:
    room = PackedWeight.empty(*weight.shape)
    room.fill(weight)
    return room


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("channels", "inputs"), SIZES)
def test_products_are_the_references(channels: int, inputs: int, with_bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(channels, inputs).to(dtype), torch.randn(67, inputs).to(dtype)
    weight[0], x[3] = 0, 0  # their scale is 0
    bias = torch.randn(channels) if with_bias else None
    result = linear(x, packed(weight), bias)
    assert result.dtype == dtype and torch.equal(result, reference_linear(x, weight, bias))
    exact = x.float() @ weight.float().T + (bias if with_bias else 0)
    assert (result.float() - exact).abs().max() < 0.1 * inputs**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize(("channels", "inputs"), SIZES)
def test_smoothed_and_clipped_products_are_the_references(
    channels: int, inputs: int, clip: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(channels, inputs).to(dtype), torch.randn(13, inputs).to(dtype)
    smoothing = torch.rand(inputs) * 10 + 0.1
    room = replace(PackedWeight.empty(channels, inputs), factors=smoothing.reciprocal())
    rounding = room.fill(weight, smoothing, clip)
    assert torch.equal(linear(x, room, None), reference_linear(x, weight, None, smoothing, clip))
    levels, scales = quantized(weight, smoothing, clip)
    wide = weight.float() * smoothing
    error = (levels * scales[:, None] - wide).norm() / wide.norm()
    assert rounding.error == pytest.approx(error.item(), rel=1e-4, abs=1e-6)
    beyond = (wide.abs() > wide.abs().amax(1, keepdim=True) * clip).float().mean().item()
    assert rounding.clipped == pytest.approx(beyond) and (clip == 1) == (rounding.clipped == 0)


def test_smoothing_saves_what_an_outlier_channel_would_drown() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(64, 160), torch.randn(50, 160)
    x[:, 7] *= 300
    exact = x @ weight.T
    smoothing = x.abs().amax(0) ** 0.5 / weight.abs().amax(0) ** 0.5
    plain, smoothed = ((reference_linear(x, weight, None, vector) - exact).norm() for vector in (None, smoothing))
    assert smoothed < plain / 3


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_depends_neither_on_the_others_nor_on_the_threads(threads: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(67, 160), packed(torch.randn(300, 160))
    together = linear(x, weight, None)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in range(1, 67):
            assert torch.equal(linear(x[-rows:], weight, None), together[-rows:])
    finally:
        torch.set_num_threads(before)


def test_rows_may_lie_apart() -> None:
    torch.manual_seed(0)
    wide = torch.randn(5, 320)
    left, right = wide[:, :160], wide[:, 160:]
    assert torch.equal(linear(left, packed(right), None), reference_linear(left, right, None))


def test_the_largest_sums_do_not_overflow() -> None:
    x, matrix = torch.ones(2, 8192), torch.ones(64, 8192)
    torch.testing.assert_close(linear(x, packed(matrix), None), x @ matrix.T)
    torch.testing.assert_close(linear(-x, packed(matrix), None), -x @ matrix.T)


def test_what_is_no_number_stays_none() -> None:
    x = torch.ones(2, 20)
    x[1, 7] = torch.nan
    result = linear(x, packed(torch.ones(3, 20)), None)
    assert result[0].isfinite().all() and result[1].isnan().all()


def test_new_weights_lie_where_the_old_ones_lay() -> None:
    torch.manual_seed(0)
    first, second, x = torch.randn(96, 160), 10 * torch.randn(96, 160), torch.randn(4, 160)
    room = packed(first)
    addresses = [tensor.data_ptr() for tensor in (room.packed, room.scales, room.sums)]
    before = linear(x, room, None)
    room.fill(second)
    assert torch.equal(linear(x, room, None), reference_linear(x, second, None))
    room.fill(first)
    assert torch.equal(linear(x, room, None), before)
    assert addresses == [tensor.data_ptr() for tensor in (room.packed, room.scales, room.sums)]


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.ones(2, 21), (3, 16), None, "packed must be one-dimensional"),
        (torch.ones(2, 16).double(), (3, 16), None, "x must be float32 or bfloat16"),
        (torch.ones(16), (3, 16), None, "x must be two-dimensional"),
        (torch.ones(16, 2).T, (3, 16), None, "contiguous in the last dimension"),
        (torch.ones(2, 16), (3, 16), torch.ones(4), "bias must be one-dimensional with 3 entries"),
    ],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, weight: tuple, bias: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(x, packed(torch.ones(weight)), bias)


def test_smoothing_and_clipping_that_do_not_fit_are_refused() -> None:
    room = PackedWeight.empty(3, 16)
    with pytest.raises(ValueError, match="smoothing must be one-dimensional with 16 entries"):
        room.fill(torch.ones(3, 16), torch.ones(15))
    with pytest.raises(ValueError, match="clip must be above 0"):
        room.fill(torch.ones(3, 16), clip=1.5)
    room.fill(torch.ones(3, 16))
    with pytest.raises(ValueError, match="factors must be one-dimensional with 16 entries"):
        linear(torch.ones(2, 16), replace(room, factors=torch.ones(3)), None)


def test_compiled_code_takes_any_number_of_rows() -> None:
    torch.manual_seed(0)
    x, room = torch.randn(7, 160), packed(torch.randn(96, 160))
    torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(lambda x: linear(x, room, None) + 1, backend="aot_eager", fullgraph=True)
    for rows in (x, x[:3]):
        assert torch.equal(compiled(rows), linear(rows, room, None) + 1)
