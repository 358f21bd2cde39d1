"""safe-offrl: learn from a log, finish learning in the real thing, and prove how few accidents it
cost.

Importing it registers its environments, Safety-Gymnasium's among them, with Gymnasium.
"""

import safe_offrl.envs  # noqa: F401

__version__ = "0.1.0"
