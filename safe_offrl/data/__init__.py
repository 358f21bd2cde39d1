"""Logged data in memory: episodes, what is derived from them, storage, mini-batches."""
