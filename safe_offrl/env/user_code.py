"""Import what users wrote: modules in the working directory, and installed plug-ins."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import gymnasium

from safe_offrl.errors import EnvError

PLUGINS = "safe_offrl.envs"  # the entry-point group; each entry names a module


def import_user_module(name: str, purpose: str) -> Any:
    """Import a module that may lie in the working directory, as ``python -m`` would."""
    here = str(Path.cwd())
    if here not in sys.path:  # a console script does not have it
        sys.path.insert(0, here)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the user's module raises
        raise EnvError(
            f"The module {name} of the {purpose} could not be imported: {sentence(error)} "
            "Run from the folder that holds it, or install it."
        ) from error


def user_function(name: str, purpose: str, setting: str) -> Any:
    """The function behind "package.module:function"; EnvError if there is none."""
    module_name, _, function = name.partition(":")
    found = getattr(import_user_module(module_name, f'{purpose} "{name}"'), function, None)
    if not callable(found):
        raise EnvError(
            f'The {purpose} "{name}" cannot be used: the module {module_name} has no function '
            f'"{function}". Check the spelling of {setting}=package.module:function.'
        )
    return found


def import_plugins() -> None:
    """Import the modules that installed packages declare in the group :data:`PLUGINS`.

    Importing one registers its environments with Gymnasium. One that fails gives a warning that
    names its package; the others are imported all the same.
    """
    for entry in importlib.metadata.entry_points(group=PLUGINS):
        try:
            entry.load()
        except Exception as error:  # whatever the plug-in's module raises
            package = entry.dist.name if entry.dist else entry.value
            warnings.warn(
                f'The environments of the package "{package}" are missing, because its module '
                f"{entry.value} could not be imported: {sentence(error)} Repair or uninstall it.",
                stacklevel=2,
            )


def sentence(error: Exception) -> str:
    """An exception as one line that ends in a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "?", "!")) else text + "."


def raised(error: BaseException) -> str:
    """An exception in one line, with the place in the user's file where it arose."""
    theirs = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not {Path(gymnasium.__file__).parent, Path(__file__).parents[1]}
        & {*Path(frame.filename).parents}
    ]
    place = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}{place}"


def fault_in_words(error: BaseException) -> str:
    """What an environment raised, and what to do, for people."""
    text = f"The environment raised {raised(error)}. "
    if isinstance(error, ValueError) and "to unpack" in str(error):
        return (
            f"{text}reset() must return (observation, info), step() (observation, reward, "
            'terminated, truncated, info), the cost in info["cost"].'
        )
    return f"{text}Repair it."
