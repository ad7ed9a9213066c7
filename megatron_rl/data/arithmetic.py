"""The built-in data set: sums whose worked solution goes column by column, carries written out.

    347+285?   7+5+0=12,4+8+1=13,3+2+1=06=632

Every step adds two digits and the carry, from the units up; the answer follows the last `=`. A demonstration may also
answer at once (`=632`), which a small model gets wrong more often: what reinforcement learning has to find out.
"""

import hashlib
import random
from dataclasses import dataclass

from megatron_rl.config.schema import Arithmetic


@dataclass(frozen=True)
class Problem:
    """One sum, as texts."""

    prompt: str
    answer: str
    response: str  # demonstration: steps and answer, or the answer at once


def arithmetic_problems(arithmetic: Arithmetic, seed: int, heldout: bool) -> list[Problem]:
    """The training or held-out problems, `train_size` or `eval_size` of them."""
    size = arithmetic.eval_size if heldout else arithmetic.train_size
    return [arithmetic_problem(arithmetic, seed, index, heldout) for index in range(size)]


def arithmetic_problem(arithmetic: Arithmetic, seed: int, index: int, heldout: bool) -> Problem:
    """Problem number `index`: a function of its arguments alone.

    Whether a sum is held out is a property of its numbers, not of the draw: no held-out sum is ever a training
    problem, whatever the seeds and sizes, in either order of the numbers.
    """
    draw = random.Random(f"{seed}/{'heldout' if heldout else 'train'}/{index}")
    while True:
        digits = draw.randint(arithmetic.min_digits, arithmetic.max_digits)
        first, second = (draw.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        if is_heldout(first, second) == heldout:
            break
    steps = "" if draw.random() < arithmetic.direct_share else worked_steps(first, second)
    return Problem(f"{first}+{second}?", str(first + second), f"{steps}={first + second}")


def is_heldout(first: int, second: int) -> bool:
    """Whether the sum of these two belongs to the held-out eighth of all sums."""
    key = f"{min(first, second)}+{max(first, second)}"
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] % 8 == 0


def worked_steps(first: int, second: int) -> str:
    """The columns from the units up: `digit+digit+carry=sum`, the sum with two digits, separated by commas."""
    steps, carry = [], 0
    for a, b in zip(reversed(str(first)), reversed(str(second)), strict=True):
        total = int(a) + int(b) + carry
        steps.append(f"{a}+{b}+{carry}={total:02d}")
        carry = total // 10
    return ",".join(steps)
