"""Logging a dataset: behaviours, their training, and the mixture of them."""
