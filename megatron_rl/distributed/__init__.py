"""Processes of the trainer: devices, groups, coordination with the driver, hangs and preemption."""
