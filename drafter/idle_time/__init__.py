"""Idle time of the trainer, and how it is filled with slices of other work."""
