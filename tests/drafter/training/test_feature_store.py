"""The store keeps to its bytes, serves the newest first, and continues where it was."""

import torch

from drafter.eagle.packed_rows import PackedFeatures, pack
from drafter.training.feature_store import FeatureStore, size_in_bytes
from tests.drafter.policies import random_row, small_config

CONFIG = small_config()


def windows(count: int, seed: int = 0, length: int = 10) -> list[PackedFeatures]:
    return [random_row(CONFIG, [length], seed=100 * seed + number) for number in range(count)]


def sequences(row: PackedFeatures) -> list[tuple[int, ...]]:
    ends = row.cu_seqlens.tolist()
    return [tuple(row.token_ids[a:b].tolist()) for a, b in zip(ends, ends[1:], strict=False)]


def drawn(store: FeatureStore, rows: int) -> list[tuple[int, ...]]:
    result = []
    for _ in range(rows):
        result += sequences(store.take(len(store.next_windows(store.tokens_per_row))))
    return result


def names(rows: list[PackedFeatures]) -> set[tuple[int, ...]]:
    return {tuple(row.token_ids.tolist()) for row in rows}


def test_an_empty_store_gives_nothing():
    store = FeatureStore(10**6, 32)
    assert store.next_windows(32) == [] and store.held_out_rows() == [] and store.bytes == 0


def test_rows_are_packed_up_to_the_limit_and_a_pass_gives_every_window_once():
    store, rows = FeatureStore(10**9, 32), windows(7)
    store.add(1, rows, [])
    lengths = []
    for _ in range(3):
        lengths.append(store.next_windows(32))
        assert len(store.take(len(lengths[-1])).token_ids) == sum(lengths[-1])
    assert lengths == [[10, 10, 10], [10, 10, 10], [10]]
    store.add(1, [], [])
    assert set(drawn(store, 3)) == names(rows)


def test_a_window_longer_than_a_row_is_a_row_by_itself():
    store = FeatureStore(10**9, 8)
    store.add(1, windows(2), [])
    assert [len(s) for s in drawn(store, 2)] == [10, 10]


def test_the_next_row_may_be_asked_for_in_several_sizes_before_it_is_taken():
    store = FeatureStore(10**9, 32)
    store.add(1, windows(7), [])
    assert [len(store.next_windows(most)) for most in (32, 16, 25, 1, 32)] == [3, 1, 2, 1, 3]
    first = drawn(store, 1)
    again = FeatureStore(10**9, 32)
    again.add(1, windows(7), [])
    assert sequences(again.take(1)) + sequences(again.take(2)) == first


def test_the_newest_version_comes_first_then_the_older_ones_then_the_newest_again():
    store, old, new = FeatureStore(10**9, 10), windows(3, 1), windows(2, 2)
    store.add(1, old, [])
    drawn(store, 1)
    store.add(2, new, [])
    order = drawn(store, 7)
    assert set(order[:2]) == names(new) and set(order[2:5]) == names(old) and set(order[5:]) == names(new)


def test_the_bytes_are_bounded_and_the_oldest_windows_go_first():
    size = size_in_bytes(windows(1)[0])
    store = FeatureStore(5 * size, 10)
    for version in range(1, 6):
        store.add(version, windows(2, version), windows(1, 50 + version))
        assert store.bytes <= 5 * size
    assert len(store) == 4  # the newest two versions; the fifth window is the held-out one
    assert set(drawn(store, 4)) == names(windows(2, 5)) | names(windows(2, 4))
    store.add(6, windows(9, 6), [])
    assert len(store) == 5 and set(drawn(store, 5)) <= names(windows(9, 6))


def test_held_out_windows_are_those_of_the_newest_version_and_never_trained_on():
    store = FeatureStore(10**9, 32)
    store.add(1, windows(4, 1), windows(2, 8))
    store.add(2, windows(4, 2), windows(5, 9))
    held_out = [s for row in store.held_out_rows() for s in sequences(row)]
    assert set(held_out) == names(windows(5, 9))
    assert not set(drawn(store, 20)) & (names(windows(5, 9)) | names(windows(2, 8)))


def test_the_order_is_a_function_of_seed_and_pass():
    stores = [FeatureStore(10**9, 10, seed) for seed in (1, 1, 2)]
    for store in stores:
        store.add(1, windows(8), [])
    first, same, other = (drawn(store, 16) for store in stores)
    assert first == same != other
    assert first[:8] != first[8:]


def test_a_store_that_forgot_goes_on_like_a_new_one():
    store, other = FeatureStore(10**9, 20, 3), FeatureStore(10**9, 20, 3)
    store.add(1, windows(9), windows(1, 4))
    drawn(store, 4)
    store.forget()
    assert store.next_windows(20) == [] and store.held_out_rows() == []
    for each in (store, other):
        each.add(2, windows(9, 2), [])
    assert drawn(other, 9) == drawn(store, 9)


def test_every_version_has_an_order_of_its_own():
    store = FeatureStore(10**9, 10)
    orders = []
    for version in (1, 2):
        store.add(version, windows(8), [])
        orders.append(drawn(store, 8))
        store.forget()
    assert orders[0] != orders[1] and set(orders[0]) == set(orders[1])


def test_eagle_features_that_are_the_final_hidden_states_count_once():
    row = random_row(small_config("eagle"), [10])
    both = PackedFeatures(**(vars(row) | {"hidden_states": row.final_hidden.clone()}))
    assert size_in_bytes(both) - size_in_bytes(row) == row.final_hidden.nbytes
    packed = pack([row, row])
    assert packed.hidden_states is packed.final_hidden
    assert torch.equal(packed.cu_seqlens, torch.tensor([0, 10, 20]))
