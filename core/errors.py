"""The two families of errors that a user may meet; everything else is a bug."""


class ScansteerError(Exception):
    """Something went wrong that one sentence can name; the command line prints it and exits with 1."""


class InputError(ScansteerError, ValueError):
    """Wrong use or bad input: names the thing, the value and the way out; the command line exits with 2."""
