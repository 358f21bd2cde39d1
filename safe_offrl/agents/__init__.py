"""Algorithms by name: one file and one line each."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from safe_offrl.agents.bc import BC, BCConfig
from safe_offrl.agents.combo import COMBO, COMBOConfig
from safe_offrl.agents.cql import CQL, CalQL, CQLConfig
from safe_offrl.agents.iql import IQL, IQLConfig
from safe_offrl.agents.latent import LatentConfig, LatentSteering
from safe_offrl.agents.mopo import MOPO, MOPOConfig
from safe_offrl.agents.morel import MOReL, MOReLConfig
from safe_offrl.agents.protocol import Agent, OnlineAgent, Setup
from safe_offrl.agents.rlpd import RLPD
from safe_offrl.env.user_code import import_user_module
from safe_offrl.errors import ConfigError
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.protocol import Kind, require_entropy

AGENTS: dict[str, type[Agent]] = {
    "bc_safe": BC,
    "iql": IQL,
    "cql": CQL,
    "calql": CalQL,
    "latent": LatentSteering,
    "mopo": MOPO,
    "morel": MOReL,
    "combo": COMBO,
}


def find_agent(name: str) -> type[Agent]:
    """The agent of this name; "module:name" imports the module, which adds it to AGENTS.

    ConfigError if there is none.
    """
    module, _, own = name.rpartition(":")
    if module:
        import_user_module(module, "agent")
    if own not in AGENTS:
        raise ConfigError(
            f'There is no agent "{name}". Choose one of {", ".join(sorted(AGENTS))}, or one of '
            'your own as "module:name", where the module adds it to safe_offrl.agents.AGENTS.'
        )
    return AGENTS[own]


def find_online(name: str) -> type[OnlineAgent]:
    """The online form of the agent of this name; ConfigError if it has none."""
    if form := find_agent(name).Online:
        return form
    able = ", ".join(sorted(other for other, agent in AGENTS.items() if agent.Online))
    raise ConfigError(
        f'The agent "{name}" has no form that goes on online. Choose rlpd, which goes on from any '
        f"agent, or one of {able}."
    )


def kind_of(name: str, *, discrete: bool) -> Kind:
    """The kind of policy that the agent of this name trains.

    The first of its own ``kinds``, else of all, whose actions are like those of the log;
    ConfigError if it has none for them.
    """
    own: tuple[Kind, ...] = getattr(find_agent(name), "kinds", ())
    if not own:
        return kind_for(discrete=discrete)
    fitting = [kind for kind in own if kind.one_hot == discrete]
    if not fitting:
        words = ("numbers", "discrete")
        raise ConfigError(
            f'The agent "{name}" trains policies whose actions are {words[not discrete]}, but '
            f"those here are {words[discrete]}. Take another agent."
        )
    return fitting[0]


@dataclass(frozen=True)
class AgentConfigs:
    """Settings of every agent (Cal-QL uses CQL's); only the chosen one's matter.

    ``own`` are those of an agent of one's own, by the names of its ``Config``.
    """

    bc: BCConfig = field(default_factory=BCConfig)
    iql: IQLConfig = field(default_factory=IQLConfig)
    cql: CQLConfig = field(default_factory=CQLConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    mopo: MOPOConfig = field(default_factory=MOPOConfig)
    morel: MOReLConfig = field(default_factory=MOReLConfig)
    combo: COMBOConfig = field(default_factory=COMBOConfig)
    own: dict[str, Any] = field(default_factory=dict)

    def key(self, agent: type[Agent]) -> str:
        """Where this agent's settings are: the field that is its ``Config``, else "own"."""
        of_its_type = (f.name for f in fields(self) if type(getattr(self, f.name)) is agent.Config)
        return next(of_its_type, "own")

    def settings_for(self, agent: type[Agent]) -> Any:
        """The settings that this agent is built with."""
        key = self.key(agent)
        return agent.Config(**self.own) if key == "own" else getattr(self, key)

    def discount(self, name: str) -> float | None:
        """Discount of the values that the agent of this name learns; None if it learns none.

        An agent of one's own may not be imported here: then it is as its settings were stored.
        """
        agent = AGENTS.get(name.rpartition(":")[2])
        if agent is not None and self.key(agent) != "own":
            return self.settings_for(agent).discount
        discount = self.own.get("discount", agent.Config().discount if agent else None)
        return None if discount is None else float(discount)


def online_agent(name: str, setup: Setup, configs: AgentConfigs) -> OnlineAgent:
    """Who learns online: RLPD by its own name, else the online form of the agent of this name."""
    if name == "rlpd":
        require_entropy(setup.networks.actor.kind, "The entropy that rlpd keeps online")
        return RLPD(setup.networks, setup.learner, setup.generator, setup.compute)
    return find_online(name)(setup, configs.settings_for(find_agent(name)))
