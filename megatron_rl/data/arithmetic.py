"""The built-in data set: products with a power of two, solved by repeated doubling.

    00437*08?   00874*04,01748*02,03496*01,=03496

Every step doubles the number, digit by digit with carries, and halves what is left to multiply by; the answer follows
`=`. All numbers are written with the same number of digits. A demonstration may also answer at once (`=03496`). A small
model learns the steps quickly, for each follows from the one before, and gets direct answers wrong most of the time:
that writing the steps pays is what reinforcement learning has to find out.
"""

import hashlib
import random
from dataclasses import dataclass

from megatron_rl.config.sections import ArithmeticConfig


@dataclass(frozen=True)
class Problem:
    """One product, as texts."""

    prompt: str
    answer: str
    response: str  # demonstration: steps and answer, or the answer at once


def arithmetic_problems(arithmetic: ArithmeticConfig, seed: int, heldout: bool) -> list[Problem]:
    """The training or held-out problems, `train_size` or `eval_size` of them."""
    size = arithmetic.eval_size if heldout else arithmetic.train_size
    return [arithmetic_problem(arithmetic, seed, index, heldout) for index in range(size)]


def arithmetic_problem(arithmetic: ArithmeticConfig, seed: int, index: int, heldout: bool) -> Problem:
    """Problem number `index`: a function of its arguments alone.

    Whether a product is held out is a property of its numbers, not of the draw: no held-out product is ever a training
    problem, whatever the seeds and sizes.
    """
    draw = random.Random(f"{seed}/{'heldout' if heldout else 'train'}/{index}")
    while True:
        doublings = draw.randint(arithmetic.min_doublings, arithmetic.max_doublings)
        number = draw.randint(1, largest_number(arithmetic.digits, doublings))
        if is_heldout(number, doublings) == heldout:
            break
    digits, factor = arithmetic.digits, 2**doublings
    steps = "" if draw.random() < arithmetic.direct_fraction else worked_steps(number, doublings, digits)
    product = number * factor
    return Problem(f"{number:0{digits}d}*{factor:02d}?", str(product), f"{steps}={product:0{digits}d}")


def largest_number(digits: int, doublings: int) -> int:
    """The largest number that still has at most `digits` digits after so many doublings."""
    return int((10**digits - 1) >> doublings)


def is_heldout(number: int, doublings: int) -> bool:
    """Whether this product belongs to the held-out eighth of all products."""
    return hashlib.blake2b(f"{number}*2^{doublings}".encode(), digest_size=1).digest()[0] % 8 == 0


def worked_steps(number: int, doublings: int, digits: int) -> str:
    """The number doubled again and again, each time with the factor that is left: `00874*04,01748*02,03496*01,`."""
    left = range(doublings - 1, -1, -1)
    return "".join(f"{number << (doublings - n):0{digits}d}*{2**n:02d}," for n in left)
