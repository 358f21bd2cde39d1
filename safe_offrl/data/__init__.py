"""Logged data in memory: episodes, what is derived from them, the online buffer, mini-batches."""
