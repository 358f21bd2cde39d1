"""safe-offrl: learn from a log, finish learning in the real thing, and prove how few accidents it
cost.

Importing it registers its environments, Safety-Gymnasium's among them, with Gymnasium.
"""

from typing import TYPE_CHECKING, Any

import safe_offrl.envs  # noqa: F401

if TYPE_CHECKING:
    from safe_offrl.policy import load_policy

__version__ = "0.1.0"
__all__ = ["__version__", "load_policy"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: `safe-offrl --help` shall answer at once."""
    if name != "load_policy":
        raise AttributeError(f"module 'safe_offrl' has no attribute '{name}'")
    from safe_offrl.policy import load_policy

    return load_policy
