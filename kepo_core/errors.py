"""Errors of bad input: one sentence that names the parameter, file or row, and what was expected."""


class ParamError(ValueError):
    """A parameter is unknown, of the wrong type or out of range; the message is one sentence that names it."""


class DataError(ValueError):
    """A data file, row or image that cannot be used; the message is one sentence naming it and what was expected."""
