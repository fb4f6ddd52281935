"""What every entry point does around its work: one line for a user's mistake, a traceback for ours."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import InstantiationException
from omegaconf.errors import MissingMandatoryValue

from ldae.errors import EXIT_USER_ERROR, UserError

log = logging.getLogger("ldae")


def _user_error(error: BaseException | None) -> UserError | None:
    """The UserError that `error` is, or that caused it: Hydra wraps what a constructor raises."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a UserError, or a mandatory value left out, into one line on stderr and exit code 2."""
    try:
        yield
    except (UserError, InstantiationException) as error:
        user = _user_error(error)
        if user is None:
            raise
        log.error("%s", user)
        sys.exit(EXIT_USER_ERROR)
    except MissingMandatoryValue as error:
        log.error("%s must be given, e.g. %s=VALUE", error.full_key, error.full_key)
        sys.exit(EXIT_USER_ERROR)
