"""The one error type for anything a user can get wrong."""


class ConfigError(ValueError):
    """A user's mistake, reported in one sentence that names the key or file and the remedy.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """

    def __init__(self, sentence: str) -> None:
        """What files and keys bring into the sentence cannot break its line, nor the terminal: line ends, control
        characters and halves of surrogate pairs are written as escapes."""
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence))
