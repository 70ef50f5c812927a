"""The one exception for mistakes that a user can mend."""


class InputError(ValueError):
    """Bad input. The message names the thing and the mend; scripts print it without a traceback and exit with 2."""
