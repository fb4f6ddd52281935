"""The one exception that a user is meant to read, and how a process ends."""

EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL: a scheduler may start the same command again


class UserError(Exception):
    """Something the user gave is wrong. The message is one line: what, where, what to do."""
