"""Which stored runs may import what their settings name: those made here, and those vouched for.

An environment "module:Id", an accident rule "module:function" and an agent "module:name" import the
module, which executes it. On the command line that is the user's own word. In the config.yaml of a
run that somebody else made it is theirs, so this machine keeps a list of the settings that it may
believe: a file named by the sha256 of config.yaml, in the cache folder, written when a run is made.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safe_offrl.data.content import metadata_text
from safe_offrl.errors import ConfigError, RunError
from safe_offrl.files import cache_folder, unwritable
from safe_offrl.record.progress import Say
from safe_offrl.record.run import RunDir
from safe_offrl.record.run_config import RunInputs
from safe_offrl.spec import SafetySpec


def trust_own(
    config_text: str, inputs: RunInputs, safety: SafetySpec, say: Say, agent: str = ""
) -> None:
    """Remember settings that a run is about to be made with, if they import anything.

    Where nothing can be remembered, it says so: it is asked for then.
    """
    if named_modules(inputs, safety, agent):
        try:
            remember(config_text)
        except RunError as error:
            say(f"note        this run will have to be trusted before it is used. {error}")


def trust_log(metadata: Mapping[str, Any]) -> None:
    """Remember what a log that was made here says of itself, if that would import anything."""
    signals = metadata.get("signals")
    sources = signals.values() if isinstance(signals, dict) else ()
    named = (metadata.get("env_id", ""), metadata.get("accident", ""), *sources)
    if any(":" in str(source) for source in named):
        with contextlib.suppress(RunError):  # Where nothing can be remembered, trust is asked for.
            remember(metadata_text(metadata))


def is_trusted_log(metadata: Mapping[str, Any]) -> bool:
    """Whether a log that names a module was made here."""
    return _record(metadata_text(metadata)).is_file()


def require_trusted_log(metadata: Mapping[str, Any], signal: str = "") -> None:
    """Raise ConfigError if what a log from elsewhere names would be imported: its accident rule, or
    the function that finds this ``signal`` of it.
    """
    rule = str(metadata["signals"][signal] if signal else metadata["accident"])
    made = f'found the signal "{signal}" by' if signal else "was made under the accident rule"
    if ":" in rule and not is_trusted_log(metadata):
        raise ConfigError(
            f'The log {made} "{rule}", which would be imported and '
            "executed, and it was not made on this machine as far as it knows. If you trust it, "
            f"say safety.{f'signals.{signal}' if signal else 'accident'}={rule}; else name another "
            f"{'source' if signal else 'rule'}."
        )


def remember(config_text: str) -> None:
    """Believe these settings from now on; RunError where that cannot be kept."""
    path = _record(config_text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise RunError(
            f'The list of runs made here, "{path.parent}", cannot be written ({error.strerror}). '
            "Set SAFE_OFFRL_CACHE to a folder of yours."
        ) from error


def require_trusted(run: RunDir, inputs: RunInputs, safety: SafetySpec, agent: str = "") -> None:
    """Raise RunError if the settings of a run from elsewhere would import something.

    An ``agent`` is imported by whoever learns: it is named where that is what comes next.
    """
    # Nothing is imported where the program has imported the environment's module itself; but of a
    # module that is there, an accident rule could be any function.
    known = inputs.env_id.partition(":")[0] in sys.modules
    named = named_modules(inputs, safety, agent)
    names = [name for name in named if not (known and name == inputs.env_id)]
    record = _record(run.config_text)
    if not names or record.is_file():
        return
    importing = f"using it would import and execute {', '.join(names)}"
    vouch = f"If you trust whoever made it, say so once: safe-offrl trust {run.path}"
    if why := unwritable(record.parent):
        raise RunError(
            f'Whether the run "{run.name}" was made on this machine is not known: the list of '
            f'those that were, "{record.parent}", cannot be written ({why}), and {importing}. Set '
            f"SAFE_OFFRL_CACHE to a folder of yours. {vouch}"
        )
    raise RunError(
        f'The run "{run.name}" was not made on this machine as far as it knows, and {importing}. '
        f"{vouch}"
    )


def named_modules(inputs: RunInputs, safety: SafetySpec, agent: str) -> list[str]:
    """The environment, the accident rule, the signals and the agent, if they name a module."""
    named = (inputs.env_id, safety.accident, *safety.signals.values(), agent)
    return [name for name in named if ":" in name]


def _record(config_text: str) -> Path:
    return cache_folder() / "trusted" / hashlib.sha256(config_text.encode()).hexdigest()
