"""Waits of the trainer, and how they are filled with slices of other work."""
