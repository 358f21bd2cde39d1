"""Tensors in, tensors out: the losses."""
