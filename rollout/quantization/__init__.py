"""Engines with int8 and fp8 weights."""
