"""What an engine step costs with and without drafts: when a draft token pays, and how much accepted ones save."""

from rollout.speculation.latency_model import LatencyModel

_PLAIN, _DRAFTS = "none", "drafts"
_LEAST, _MOST = 0.05, 0.8


class StepCost:
    """Learned from steps in which every request decodes."""

    def __init__(self) -> None:
        self._latency = LatencyModel()

    def observe(self, batch: int, drafted: int, seconds: float) -> None:
        """Record one step of `batch` requests with `drafted` draft tokens in all."""
        self._latency.observe(_DRAFTS if drafted else _PLAIN, batch, drafted, seconds)

    def threshold(self, batch: int) -> float:
        """A draft token pays if its chance of acceptance is higher than this: the cost of a row by that of a token."""
        return min(max(self._latency.seconds_per_row() * batch / self._plain(batch), _LEAST), _MOST)

    def saved(self, batch: int, emitted: int, seconds: float) -> float:
        """Seconds that plain steps would have taken longer for as many tokens; negative if they would be faster."""
        return emitted / batch * self._plain(batch) - seconds

    def _plain(self, batch: int) -> float:
        seconds, _ = self._latency.predict(_PLAIN, batch, 0)
        return seconds
