"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user gave is wrong. The message is one line: what, where, what to do."""
