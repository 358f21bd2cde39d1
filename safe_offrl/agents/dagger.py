"""DAgger (Ross et al. 2011, arXiv:1011.0686): imitate a controller in the states that one visits.

Offline it is behaviour cloning. Online the policy acts, never the controller (the paper's beta is
0): the constraints decide what acts, shield and guard what it does. What was seen is labelled
afterwards by c, a controller that the environment offers (env/controllers.py):

    minimise E_log[-w log pi(a|s)] + E_online[-w log pi(c(s)|s)] + kl_weight KL(pi || anchor)

with w against risk (agents/weighted_imitation.py). The paper's aggregate counts each row alike;
here log and labels each have their share of a batch. Labels are asked for in every update, so c
must be a function of the observation alone. That takes as long as so many calls of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safe_offrl.agents.bc import BC, BCConfig
from safe_offrl.agents.protocol import OnlineAgent, Setup
from safe_offrl.agents.steering import Steering
from safe_offrl.agents.weighted_imitation import WeightedImitation
from safe_offrl.compute.state import Part
from safe_offrl.data.sampling import logged_rows
from safe_offrl.errors import ConfigError
from safe_offrl.policies.categorical import CATEGORICAL
from safe_offrl.policies.mixture import MIXTURE
from safe_offrl.types import Batch


@dataclass(frozen=True)
class DAggerConfig:
    """Settings of DAgger: ``controller`` is the name of the one that labels; "" the only one."""

    learning_rate: float = 3e-4
    discount: float | None = None
    controller: str = ""


class OnlineDAgger:
    """Imitation of the log and of the controller; there are no values of reward."""

    own_values = True
    return_discount: float | None = None

    def __init__(self, setup: Setup, config: DAggerConfig) -> None:
        if setup.controller is None:
            raise ConfigError(
                "dagger needs a controller to label what it sees, but was given none. Take an "
                "environment that offers one, or another learner."
            )
        self.actor, self.controller = setup.networks.actor, setup.controller
        self.offline_share = setup.offline_share
        self.imitation = WeightedImitation(
            setup, "dagger", lambda batch, _: torch.ones_like(batch.rewards), config.learning_rate
        )

    def parts(self) -> dict[str, Part]:
        """What a checkpoint keeps."""
        return {"actor": self.actor, **self.imitation.parts()}

    def labelled(self, batch: Batch) -> Batch:
        """The batch with the controller's actions where they are not logged."""
        n = logged_rows(len(batch.rewards), self.offline_share)
        labels = self.controller(batch.observations[n:])
        return batch._replace(actions=torch.cat([batch.actions[:n], labels]))

    def update_critics(self, batch: Batch) -> dict[str, Tensor]:
        """Nothing: it learns no values."""
        return {}

    def update_actor(self, batch: Batch, steering: Steering) -> dict[str, Tensor]:
        """One step of the actor."""
        return {"learner/actor_loss": self.imitation.update(self.labelled(batch), steering)}


class DAgger:
    """DAgger before it has met its teacher: behaviour cloning."""

    Config = DAggerConfig
    Online: type[OnlineAgent] | None = OnlineDAgger
    kinds = (MIXTURE, CATEGORICAL)
    goes_on = True

    def __init__(self, setup: Setup, config: DAggerConfig) -> None:
        self.bc = BC(setup, BCConfig(config.learning_rate), "dagger")
        self.parts, self.update = self.bc.parts, self.bc.update
