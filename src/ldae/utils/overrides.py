"""Command-line arguments KEY=VALUE as people type them, made into what Hydra's grammar takes.

Hydra reads a value as an expression: a path with an umlaut, `~`, `&`, `=` or a bracket is a syntax error, `a,b` is a
sweep, and 2024_05 is the number 202405. Here such a value becomes quoted text. Whatever Hydra understands is left
alone, so that lists, sweeps and values that are quoted already mean the same as before.
"""

import os
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from ldae.utils.errors import UserError

# Settings whose value is text, even if it looks like a number or a list.
TEXT = frozenset(
    {
        "name", "data.table", "paths.runs", "paths.data", "paths.cache", "stage.aekl", "stage.pretrain",
        "stage.latents", "stage.initial_weights",
    }
)  # fmt: skip
MULTIRUN = {"-m", "--multirun"}

_KEY_VALUE = re.compile(r"(?P<key>[+]{0,2}[\w@./:]+)=(?P<value>.*)", re.DOTALL)
_BEFORE_QUOTE = re.compile(r"(\\*)('|$)")


def quote_overrides(arguments: Sequence[str]) -> list[str]:
    """The arguments of a script with every KEY=VALUE in a form that Hydra takes; options are left as they are.

    Raises:
        UserError: an argument is neither an option nor KEY=VALUE.
    """
    sweep = bool(MULTIRUN & set(arguments))
    parser = OverridesParser.create()
    result, value_of_option, previous = [], False, ""
    for argument in arguments:
        if value_of_option or argument.startswith("-"):
            result.append(argument)
            value_of_option = argument in _OPTIONS_WITH_VALUE
        else:
            result.append(_quote(argument, parser, sweep, previous))
        previous = argument
    return result


_OPTIONS_WITH_VALUE = {
    "-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir", "--info",
}  # fmt: skip


def _quote(argument: str, parser: OverridesParser, sweep: bool, previous: str) -> str:
    match = _KEY_VALUE.fullmatch(argument)
    if match is None:
        return _check(argument, parser, previous)
    key, value = match["key"], match["value"]
    if value == "~" or value.startswith("~/"):
        value = os.path.expanduser(value)
    try:
        override = parser.parse_override(f"{key}={value}")
    except HydraException:
        return f"{key}={_quoted(value)}"
    is_text = override.value() is None or isinstance(override.value(), str)
    is_plain_list = override.is_sweep_override() and not sweep
    as_typed = is_text or override.is_sweep_override()
    if key.lstrip("+") in TEXT and (is_plain_list or not as_typed):
        value = _quoted(value)
    return f"{key}={value}"


def _check(argument: str, parser: OverridesParser, previous: str) -> str:
    """`argument`, which may delete a key (~KEY). The message names a mistyped option whose value it is."""
    try:
        parser.parse_override(argument)
    except HydraException as error:
        shown = f"{previous} {argument}" if previous.startswith("-") else argument
        raise UserError(f"cannot read the argument {shown!r}: write KEY=VALUE, such as name=mycohort") from error
    return argument


def _quoted(value: str) -> str:
    """`value` in single quotes, which a backslash escapes, as it does itself in front of one."""
    return "'" + _BEFORE_QUOTE.sub(lambda match: match[1] * 2 + ("\\'" if match[2] else ""), value) + "'"
