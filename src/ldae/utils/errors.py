"""The exception for mistakes that a user can correct, and exit statuses."""

EXIT_USER_ERROR = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL: a job scheduler may run the same command again


class UserError(Exception):
    """An input is wrong. The message is one line that says what is wrong, where, and what to do."""
