import subprocess
import sys
from collections import Counter

import pytest

from megatron_rl.data import PromptOrder, evaluation_seed, rollout_seed


def _visits(order, steps):
    return [visit for step in range(steps) for visit in order.indices(step)]


@pytest.mark.parametrize(("num_prompts", "per_step"), [(10, 4), (8, 8), (3, 7), (1, 2)])
def test_every_epoch_visits_every_prompt_once(num_prompts, per_step):
    visits = _visits(PromptOrder(num_prompts, per_step, seed=1), num_prompts * 3)
    counts = Counter(visits)
    assert set(counts.values()) == {1}
    last_epoch = visits[-1][1]
    for epoch in range(last_epoch):
        assert {index for index, visited in visits if visited == epoch} == set(range(num_prompts))


def test_steps_are_full_and_straddle_epochs():
    order = PromptOrder(10, 4, seed=1)
    assert [len(order.indices(step)) for step in range(5)] == [4] * 5
    assert [epoch for _, epoch in order.indices(2)] == [0, 0, 1, 1]


def test_a_step_is_a_function_of_its_number_alone():
    expected = [PromptOrder(100, 8, seed=3).indices(step) for step in range(40)]
    resumed = PromptOrder(100, 8, seed=3)
    assert [resumed.indices(step) for step in (39, 17, 0)] == [expected[39], expected[17], expected[0]]


def test_epochs_and_seeds_have_different_orders():
    first = [index for index, _ in PromptOrder(100, 100, seed=3).indices(0)]
    assert first != sorted(first)
    assert first != [index for index, _ in PromptOrder(100, 100, seed=3).indices(1)]
    assert first != [index for index, _ in PromptOrder(100, 100, seed=4).indices(0)]
    assert first != [index for index, _ in PromptOrder(100, 100, seed=-3).indices(0)]


def test_order_is_the_same_in_another_process():
    code = "from megatron_rl.data import *; print(PromptOrder(50, 20, 7).indices(3), rollout_seed(1, 2, 'p', 3))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"{PromptOrder(50, 20, 7).indices(3)} {rollout_seed(1, 2, 'p', 3)}"


def test_seeds_stay_what_they_are():
    # Changing them would change every run: a new release must not do so unnoticed.
    assert rollout_seed(0, 0, "arithmetic/0", 0) == 6232026268734585713
    assert evaluation_seed(0, 0, "arithmetic/0", 0) == 4207981695924136412


def test_seeds_are_distinct_for_every_argument_and_stream():
    arguments = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1), (0, 1, "a1", 0)]
    seeds = [stream(*values) for stream in (rollout_seed, evaluation_seed) for values in arguments]
    seeds.append(rollout_seed(0, 0, "a", 0, epoch=1))
    assert len(set(seeds)) == len(seeds)


def test_seeds_are_in_range():
    seeds = [rollout_seed(0, step, "p", sample) for step in range(50) for sample in range(20)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    assert len(set(seeds)) == len(seeds)


def test_nonsense_sizes_are_refused():
    with pytest.raises(ValueError, match="positive"):
        PromptOrder(0, 4, 0)
