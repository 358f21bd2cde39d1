"""Bounds and intervals: of episodes, of runs, of predicted risks."""
