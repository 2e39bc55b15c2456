"""The errors that the command line shows to the user as one plain line."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, and what to do."""


class Diverged(RuntimeError):
    """The loss is not finite any more."""
