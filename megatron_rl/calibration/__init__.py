"""Calibration of int8 engines: what rounding does to each layer, and how to make it less."""
