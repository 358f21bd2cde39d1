"""Logged data: the file format, its validation, storage, mini-batches, and a summary."""
