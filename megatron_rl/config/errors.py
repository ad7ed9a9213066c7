"""The one error type for anything a user can get wrong."""


class ConfigError(ValueError):
    """A user's mistake, reported in one sentence that names the key or file and the remedy.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """
