"""Quantized bases: found by their tensors, dequantized in numpy, folded into their scales. One module a
format."""
