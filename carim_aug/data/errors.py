"""The family of everything wrong with data on disk; each message names the file, the rule and the value found."""


class DataError(ValueError):
    """A table, image or archive on disk is missing, unreadable, or breaks the rule its message states."""
