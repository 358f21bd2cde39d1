"""safe-offrl: learn from a log, finish learning in the real thing, and prove how few accidents it
cost.
"""

__version__ = "0.1.0"
