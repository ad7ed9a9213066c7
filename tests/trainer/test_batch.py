"""Splitting a batch into micro-batches, and packing one."""

import pytest
import torch

from megatron_rl.trainer.batch import Batch, build_microbatch, plan_microbatches


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 10, 1000])
def test_every_sequence_is_in_exactly_one_microbatch(ranks: int, budget: int):
    lengths = [7, 3, 9, 1, 4, 12, 5]
    plan = plan_microbatches(lengths, budget, ranks)
    assert len(plan) == ranks
    assert sorted(index for rank in plan for row in rank for index in row) == list(range(len(lengths)))


def test_rows_keep_the_token_budget_unless_one_sequence_exceeds_it():
    lengths = [7, 3, 9, 1, 4, 12, 5]
    for rank in plan_microbatches(lengths, 10, 2):
        assert all(len(row) == 1 or sum(lengths[index] for index in row) <= 10 for row in rank)


def test_ranks_get_nearly_equal_tokens():
    lengths = [100, 90, 80, 20, 10, 10, 5, 5]
    loads = [sum(lengths[i] for row in rank for i in row) for rank in plan_microbatches(lengths, 128, 2)]
    assert max(loads) - min(loads) <= 20


def test_a_rank_without_sequences_still_has_a_microbatch():
    plan = plan_microbatches([5], 10, 3)
    assert plan == [[[0]], [[]], [[]]]


def test_rows_point_at_the_logits_that_predict_the_response():
    batch = Batch([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]], {"advantages": torch.arange(5.0)})
    packed = build_microbatch(batch, [1, 0], multiple=4, device=torch.device("cpu"))
    assert packed.input_ids.tolist() == [[4, 7, 8, 9, 1, 2, 3, 5, 6, 0, 0, 0]]
    assert packed.rows.tolist() == [0, 1, 2, 6, 7]
    assert packed.targets.tolist() == [7, 8, 9, 5, 6]
    assert packed.flat_index.tolist() == [2, 3, 4, 0, 1]
    assert packed.values["advantages"].tolist() == [2, 3, 4, 0, 1]
    assert packed.packing.cu_seqlens_q.tolist() == [0, 4, 9, 12]


def test_selected_part_of_a_batch_keeps_its_values():
    batch = Batch([[1], [2], [3]], [[5], [6, 7], [8]], {"advantages": torch.arange(4.0)})
    part = batch.select(1, 3)
    assert part.responses == [[6, 7], [8]]
    assert part.values["advantages"].tolist() == [1, 2, 3]


def test_replicas_whose_passes_meet_get_equally_many_micro_batches():
    lengths = [50, 20, 20, 20]
    assert plan_microbatches(lengths, 40, 2) == [[[0]], [[1, 2], [3]]]
    assert plan_microbatches(lengths, 40, 2, equally_many=True) == [[[0], []], [[1, 2], [3]]]
