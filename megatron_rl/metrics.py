"""What the parts of a run measure: numbers by the names of `docs/metrics.md`."""

Metrics = dict[str, float]
