"""Quantized linear layers: formats, calibration, kernels and recipes."""
