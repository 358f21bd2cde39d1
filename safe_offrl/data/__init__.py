"""Logged data: formats, validation, conversion, storage in and out of memory, mini-batches."""
