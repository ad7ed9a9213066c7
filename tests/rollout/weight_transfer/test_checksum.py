"""The checksum as a function: additive over shards, sensitive to single bits."""

import pytest
import torch

from rollout.weight_transfer.checksum import combine, differing, partial_checksum

MODULUS = 2**64


def whole(tensor: torch.Tensor) -> int:
    return partial_checksum(tensor, tuple(slice(0, size) for size in tensor.shape), tuple(tensor.shape))


def splitmix(index: int) -> int:
    z = index * 0x9E3779B97F4A7C15 % MODULUS
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % MODULUS
    z = (z ^ z >> 27) * 0x94D049BB133111EB % MODULUS
    return (z ^ z >> 31) | 1


def test_it_is_the_documented_sum() -> None:
    tensor = torch.randn(5, 7)
    bits = tensor.view(torch.int32).reshape(-1).tolist()
    assert whole(tensor) == sum(b * splitmix(i) for i, b in enumerate(bits)) % MODULUS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_add_up_however_the_tensor_is_cut(dtype: torch.dtype) -> None:
    tensor = torch.randn(30, 22, 3).to(dtype)
    total = 0
    for rows in (slice(0, 7), slice(7, 30)):
        for columns in (slice(0, 11), slice(11, 13), slice(13, 22)):
            index = (rows, columns, slice(0, 3))
            total += partial_checksum(tensor[index], index, (30, 22, 3))
    assert total % MODULUS == whole(tensor)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16)])
def test_every_single_flipped_bit_changes_it(dtype: torch.dtype, bits: torch.dtype) -> None:
    tensor = torch.randn(3, 4).to(dtype)
    original = whole(tensor)
    width = tensor.element_size() * 8
    for element in range(tensor.numel()):
        for bit in range(width):
            flipped = tensor.clone()
            mask = -(2**bit) if bit == width - 1 else 2**bit
            flipped.view(bits).view(-1)[element] ^= mask
            assert whole(flipped) != original


def test_swapped_elements_change_it_and_strides_do_not() -> None:
    tensor = torch.randn(64, 64)
    swapped = tensor.clone()
    swapped[3, 5], swapped[5, 3] = tensor[5, 3], tensor[3, 5]
    assert whole(swapped) != whole(tensor)
    assert whole(tensor.T.contiguous().T) == whole(tensor)


def test_tensors_larger_than_a_chunk_are_summed_completely() -> None:
    tensor = torch.randn(3000, 700)
    halves = [partial_checksum(tensor[a:b], (slice(a, b), slice(0, 700)), (3000, 700)) for a, b in ((0, 1), (1, 3000))]
    assert sum(halves) % MODULUS == whole(tensor)


def test_a_shard_that_does_not_fit_its_index_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        partial_checksum(torch.zeros(3, 4), (slice(0, 4), slice(0, 4)), (8, 4))


def test_replicas_count_once_and_must_agree() -> None:
    first, second = ((0, 2),), ((2, 4),)
    assert combine([{("w", first): 5, ("n", first): 7}, {("w", second): 6, ("n", first): 7}]) == {"w": 11, "n": 7}
    with pytest.raises(RuntimeError, match="different copies of n"):
        combine([{("n", first): 7}, {("n", first): 8}])


def test_a_tied_output_layer_must_equal_the_embedding() -> None:
    trainer = {"model.embed_tokens.weight": 1, "a": 2}
    assert differing(trainer, {**trainer, "lm_head.weight": 1}) == []
    assert differing(trainer, {**trainer, "lm_head.weight": 9}) == ["lm_head.weight"]
    assert differing(trainer, {"a": 3}) == ["a", "model.embed_tokens.weight"]
