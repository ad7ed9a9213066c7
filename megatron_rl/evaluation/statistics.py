"""Accuracies of a set with their confidence intervals. Pure functions of what the responses to each problem gave.

All are means over the problems, which count as a sample of problems like them: the intervals say what another draw of
as many problems would have given, not only other seeds.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.evaluation.results import Outcome, ProblemResult

Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations
SUBSETS = 200  # of a problem's responses, for the majority of fewer than all


@dataclass(frozen=True)
class Estimate:
    """A mean over problems in [0, 1], and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def summarize(problems: Sequence[ProblemResult]) -> dict[str, Estimate]:
    """`greedy_accuracy`; of k sampled responses per problem also `avg@k`, and `pass@j` and `majority@j` for j = 2, 4, 8
    ... and k.

    Raises:
        ValueError: without problems, or when they have different numbers of responses.
    """
    samples = {len(problem.samples) for problem in problems}
    if len(samples) != 1:
        raise ValueError(f"need problems with equal numbers of responses, not {sorted(samples)}")
    k = samples.pop()
    summary = {"greedy_accuracy": estimate([float(problem.greedy.correct) for problem in problems], 1)}
    if not k:
        return summary
    right = [sum(outcome.correct for outcome in problem.samples) for problem in problems]
    summary[f"avg@{k}"] = estimate([count / k for count in right], k)
    for j in draws(k):
        summary[f"pass@{j}"] = estimate([pass_at_k(k, count, j) for count in right], k)
    for j in draws(k):
        summary[f"majority@{j}"] = estimate([majority_at_k(p.samples, j, p.problem_id) for p in problems], k)
    return summary


def draws(k: int) -> list[int]:
    """Powers of two from 2 up to `k`, and `k`: the j of `pass@j`."""
    return sorted({2**power for power in range(1, k.bit_length()) if 2**power <= k} | {k})


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of `k` responses is right, drawn without replacement from `n` of which `correct`
    are: the unbiased estimate `1 - C(n - correct, k) / C(n, k)` (Chen et al., arXiv 2107.03374, equation 1).

    Raises:
        ValueError: unless 0 <= correct <= n and 1 <= k <= n.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= correct <= n and 1 <= k <= n, not n={n}, correct={correct}, k={k}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_at_k(outcomes: Sequence[Outcome], k: int, problem_id: str) -> float:
    """Probability that the most frequent answer of `k` of the responses is right (self-consistency, arXiv 2203.11171).

    With fewer than all, the mean over `SUBSETS` random subsets, which depend on the problem's name and `k` alone.
    """
    if k == len(outcomes):
        return _majority(outcomes)
    generator = random.Random(f"{problem_id}/{k}")
    return math.fsum(_majority(generator.sample(outcomes, k)) for _ in range(SUBSETS)) / SUBSETS


def _majority(outcomes: Sequence[Outcome]) -> float:
    """Share of right responses among those with a most frequent answer, all of these if several are; responses without
    an answer do not vote."""
    votes: defaultdict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.answer is not None:
            votes[outcome.answer].append(outcome.correct)
    most = max((len(group) for group in votes.values()), default=0)
    winners = [correct for group in votes.values() if len(group) == most for correct in group]
    return sum(winners) / len(winners) if winners else 0.0


def estimate(values: Sequence[float], responses: int) -> Estimate:
    """The mean of values in [0, 1], one per problem, with Wilson's score interval (Wilson 1927).

    Wilson's interval is for yes and no. Values between them, which vary less, count as more problems than there are: as
    many as give a yes-or-no mean the variance that this mean has, but at most one per response.

    Args:
        values: of each problem.
        responses: per problem, behind each value.
    """
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.fsum((value - mean) ** 2 for value in values) / n
    most = n * responses
    effective = min(n * mean * (1 - mean) / spread, most) if spread > 0 else (n if mean in (0.0, 1.0) else most)
    return Estimate(mean, *wilson(mean, effective))


def wilson(mean: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval for a share `mean` of `n` trials."""
    centre = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
    # Rounding must not put the mean outside.
    return min(max(centre - half, 0.0), mean), max(min(centre + half, 1.0), mean)
