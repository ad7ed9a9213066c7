"""The engines of a run: Ray actors, placement, restarts, and the dispatch of requests."""
