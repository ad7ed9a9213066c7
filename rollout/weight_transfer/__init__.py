"""Weights from the trainer into engines."""
