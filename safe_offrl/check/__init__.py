"""Can an environment, or a log of it, be learnt from? Checks, replays and warnings."""
