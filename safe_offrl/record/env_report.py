"""What a check of an environment found: for people, and as plain values."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import Any

from safe_offrl.env.observations import SpacePart

_WIDTH = 100


@dataclass(frozen=True)
class Check:
    """One finding: ``status`` is "ok", "warn" or "FAIL"; ``text`` says what, and what to do."""

    status: str
    name: str
    text: str


@dataclass
class EnvReport:
    """What :func:`check_environment` found; ``measured`` holds the numbers of its sentences."""

    env_id: str
    accident: str
    checks: list[Check] = field(default_factory=list)
    layout: tuple[SpacePart, ...] = ()
    measured: dict[str, float] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """Whether nothing failed; warnings are allowed."""
        return all(check.status != "FAIL" for check in self.checks)

    def add(self, status: str, name: str, text: str) -> None:
        """Append one finding."""
        self.checks.append(Check(status, name, text))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "env_id": self.env_id,
            "accident": self.accident,
            "usable": self.usable,
            "checks": [vars(check) for check in self.checks],
            "layout": [
                {"name": p.name, "start": p.start, "stop": p.stop, "shape": list(p.box.shape)}
                for p in self.layout
            ],
            **self.measured,
        }

    def __str__(self) -> str:
        """The table for people."""
        lines = [f'check-env   {self.env_id}, safety.accident "{self.accident}"']
        for check in self.checks:
            head = f"{check.status:<5} {check.name:<16}"
            indent = " " * len(head)
            lines += textwrap.wrap(
                check.text, _WIDTH, initial_indent=head, subsequent_indent=indent
            )
            if check.name == "observations" and len(self.layout) > 1:
                width = max(len(part.name) for part in self.layout)
                lines += [
                    f"{indent}{f'[{p.start}:{p.stop}]':<10} {p.name:<{width}}  {p.box.shape}"
                    for p in self.layout
                ]
        count = {s: sum(c.status == s for c in self.checks) for s in ("warn", "FAIL")}
        verdict = "usable" if self.usable else f"not usable yet: {count['FAIL']} to repair"
        lines.append(f"{verdict}, {count['warn']} warning{'' if count['warn'] == 1 else 's'}")
        return "\n".join(lines)
