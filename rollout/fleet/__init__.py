"""The engines of a run: Ray actors, placement, restarts, and who generates what."""
