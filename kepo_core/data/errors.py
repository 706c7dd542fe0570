"""The one error that bad data raises."""


class DataError(ValueError):
    """A data file, row or image that cannot be used; the message is one sentence naming it and what was expected."""
