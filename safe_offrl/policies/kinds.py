"""The kinds of policies by name: one file and one entry each."""

from __future__ import annotations

from safe_offrl.policies.categorical import CATEGORICAL
from safe_offrl.policies.chunked import CHUNKED
from safe_offrl.policies.gaussian import GAUSSIAN
from safe_offrl.policies.latent import LATENT
from safe_offrl.policies.mixture import MIXTURE
from safe_offrl.policies.one_step import ONE_STEP
from safe_offrl.policies.proposals import PROPOSALS
from safe_offrl.policies.protocol import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (GAUSSIAN, CATEGORICAL, LATENT, MIXTURE, ONE_STEP, PROPOSALS, CHUNKED)
}


def kind_for(*, discrete: bool) -> Kind:
    """The first kind whose actions are like those of a log or an environment."""
    return next(kind for kind in KINDS.values() if kind.one_hot == discrete)
