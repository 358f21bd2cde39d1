"""Errors that are the user's to fix: one sentence what is wrong, one what to do."""


class UserError(Exception):
    """Bad input of any kind; the command line prints the message alone and exits with code 2."""


class ConfigError(UserError):
    """An unknown key, a value out of range, or settings that contradict each other."""


class DataError(UserError):
    """A dataset that is missing, damaged, or cannot teach what is asked of it."""


class EnvError(UserError):
    """An environment that cannot be made or cannot be used here."""


class EnvFault(EnvError):
    """An environment that failed in the middle: it raised, hung, died, or gave no usable numbers.

    The loops close the episode and go on with the next one; other errors stop them.
    """


class RunError(UserError):
    """A run folder that is missing, locked, damaged, or not what was asked for."""
