"""Algorithms by name: one file and one line each."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from safe_offrl.agents.awac import AWAC, AWACConfig
from safe_offrl.agents.awr import AWR, AWRConfig
from safe_offrl.agents.bc import BC, BCConfig, BCSafe
from safe_offrl.agents.bcq import BCQ, BCQConfig
from safe_offrl.agents.bcq_discrete import DiscreteBCQ, DiscreteBCQConfig
from safe_offrl.agents.bear import BEAR, BEARConfig
from safe_offrl.agents.brac import BRAC, BRACConfig, BRACValue
from safe_offrl.agents.ccil import CCIL, CCILConfig
from safe_offrl.agents.combo import COMBO, COMBOConfig
from safe_offrl.agents.cql import CQL, CalQL, CQLConfig
from safe_offrl.agents.crr import CRR, CRRConfig
from safe_offrl.agents.dagger import DAgger, DAggerConfig
from safe_offrl.agents.dqn import DQN, REM, DQNConfig
from safe_offrl.agents.fql import FQL, FQLConfig
from safe_offrl.agents.gail import GAIL, GAILConfig
from safe_offrl.agents.idql import IDQL, IDQLConfig
from safe_offrl.agents.iql import IQL, IQLConfig
from safe_offrl.agents.latent import LatentConfig, LatentSteering
from safe_offrl.agents.mopo import MOPO, MOPOConfig
from safe_offrl.agents.morel import MOReL, MOReLConfig
from safe_offrl.agents.protocol import Agent, OnlineAgent, Setup
from safe_offrl.agents.qc import QC, QCConfig
from safe_offrl.agents.qrdqn import QRDQN, QRDQNConfig
from safe_offrl.agents.rlpd import RLPD
from safe_offrl.agents.spibb import SPIBB, SoftSPIBB, SoftSPIBBConfig, SPIBBConfig
from safe_offrl.agents.td3bc import TD3BC, ReBRAC, ReBRACConfig, TD3BCConfig
from safe_offrl.env.user_code import import_user_module
from safe_offrl.errors import ConfigError
from safe_offrl.policies.kinds import kind_for
from safe_offrl.policies.protocol import Kind, require_entropy

FAMILIES: dict[str, dict[str, type[Agent]]] = {
    "imitation": {
        "bc": BC,
        "bc_safe": BCSafe,
        "awr": AWR,
        "awac": AWAC,
        "crr": CRR,
        "ccil": CCIL,
        "gail": GAIL,
        "dagger": DAgger,
    },
    "values": {"iql": IQL, "cql": CQL, "calql": CalQL},
    "constraints on the policy": {
        "td3bc": TD3BC,
        "rebrac": ReBRAC,
        "brac_p": BRAC,
        "brac_v": BRACValue,
        "bear": BEAR,
        "bcq": BCQ,
    },
    "several modes": {"latent": LatentSteering, "idql": IDQL, "fql": FQL, "qc": QC},
    "a model": {"mopo": MOPO, "morel": MOReL, "combo": COMBO},
    "discrete actions": {"dqn": DQN, "rem": REM, "qrdqn": QRDQN, "bcq_discrete": DiscreteBCQ},
    "few states": {"spibb": SPIBB, "soft_spibb": SoftSPIBB},
}
AGENTS: dict[str, type[Agent]] = {k: v for family in FAMILIES.values() for k, v in family.items()}


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


def learner_after(name: str) -> str:
    """Who goes on online from what the agent of this name learnt, where nobody else is asked for.

    That is RLPD, or the agent itself where it has a reason. For an agent of one's own, which may
    not be imported here, it is RLPD.
    """
    return name if reason_to_go_on(name) else "rlpd"


def reason_to_go_on(name: str) -> str:
    """Why the agent of this name goes on online itself, in words; "" if RLPD does."""
    agent = AGENTS.get(name)
    if agent is None or agent.Online is None:
        return ""
    if getattr(agent, "goes_on", False):
        return "offline it is behaviour cloning"
    kinds: tuple[Kind, ...] = getattr(agent, "kinds", ())
    scored = not kinds or any(kind.target_entropy is not None for kind in kinds)
    return "" if scored else "its policies have no entropy, which rlpd would keep"


def kind_of(name: str, *, discrete: bool) -> Kind:
    """The kind of policy that the agent of this name, or RLPD, trains.

    The first of its own ``kinds``, else of all, whose actions are like those of the log;
    ConfigError if it has none for them.
    """
    own: tuple[Kind, ...] = () if name == "rlpd" else getattr(find_agent(name), "kinds", ())
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
    """Settings of every agent; only the chosen one's matter.

    One's fields may be another's too: BC-Safe has BC's, Cal-QL CQL's, REM DQN's.

    ``own`` are those of an agent of one's own, by the names of its ``Config``.
    """

    bc: BCConfig = field(default_factory=BCConfig)
    awr: AWRConfig = field(default_factory=AWRConfig)
    awac: AWACConfig = field(default_factory=AWACConfig)
    crr: CRRConfig = field(default_factory=CRRConfig)
    ccil: CCILConfig = field(default_factory=CCILConfig)
    gail: GAILConfig = field(default_factory=GAILConfig)
    dagger: DAggerConfig = field(default_factory=DAggerConfig)
    iql: IQLConfig = field(default_factory=IQLConfig)
    cql: CQLConfig = field(default_factory=CQLConfig)
    td3bc: TD3BCConfig = field(default_factory=TD3BCConfig)
    rebrac: ReBRACConfig = field(default_factory=ReBRACConfig)
    brac: BRACConfig = field(default_factory=BRACConfig)
    bear: BEARConfig = field(default_factory=BEARConfig)
    bcq: BCQConfig = field(default_factory=BCQConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    idql: IDQLConfig = field(default_factory=IDQLConfig)
    fql: FQLConfig = field(default_factory=FQLConfig)
    qc: QCConfig = field(default_factory=QCConfig)
    mopo: MOPOConfig = field(default_factory=MOPOConfig)
    morel: MOReLConfig = field(default_factory=MOReLConfig)
    combo: COMBOConfig = field(default_factory=COMBOConfig)
    dqn: DQNConfig = field(default_factory=DQNConfig)
    qrdqn: QRDQNConfig = field(default_factory=QRDQNConfig)
    bcq_discrete: DiscreteBCQConfig = field(default_factory=DiscreteBCQConfig)
    spibb: SPIBBConfig = field(default_factory=SPIBBConfig)
    soft_spibb: SoftSPIBBConfig = field(default_factory=SoftSPIBBConfig)
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
        module, _, own = name.rpartition(":")
        agent = AGENTS.get(own)
        if agent is not None and self.key(agent) != "own":
            if not module:
                return self.settings_for(agent).discount
            agent = None  # That of one's own has the same name.
        discount = self.own.get("discount", agent.Config().discount if agent else None)
        return None if discount is None else float(discount)


def require_learner(name: str, kind: Kind) -> None:
    """ConfigError if the learner is RLPD and cannot go on from policies of this kind."""
    if name == "rlpd":
        require_entropy(kind, "The entropy that rlpd keeps online")


def online_agent(name: str, setup: Setup, configs: AgentConfigs) -> OnlineAgent:
    """Who learns online: RLPD by its own name, else the online form of the agent of this name."""
    if name == "rlpd":
        require_learner(name, setup.networks.actor.kind)
        return RLPD(setup.networks, setup.learner, setup.generator, setup.compute)
    return find_online(name)(setup, configs.settings_for(find_agent(name)))
