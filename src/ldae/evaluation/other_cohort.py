"""The names that results of other cohorts get, so that several cohorts are kept beside each other."""

import logging
import os
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from omegaconf import DictConfig

from ldae.evaluation.context import Evaluator
from ldae.runs import Workspace
from ldae.utils.errors import UserError
from ldae.utils.results_record import Results, read_record

log = logging.getLogger(__name__)

EXTERNAL = "external"  # the evaluation of another cohort, and the first part of its metrics' names
TAKEN = ("probe", "baseline", "ood")  # by the metrics of a cohort without a name


def find_prefix(evaluators: Mapping[str, Evaluator], space: Workspace, config: DictConfig) -> str:
    """What the names of the metrics begin with: "" for the model's own cohort, "external/..." for another one.

    Another cohort is named by evaluation.external.name. Without a name it gets the prefix "external/" or, if that
    belongs to another table, one with the name of the table's folder.

    Raises:
        UserError: the name cannot be used.
    """
    if EXTERNAL not in evaluators:
        return ""
    name = config.evaluation[EXTERNAL].get("name")
    if name is None:
        name = _choose_name(str(config.data.table), read_record(space.evaluation))
    elif not _is_usable(str(name)):
        raise UserError(
            f"evaluation.external.name={name}: letters, digits, '.', '-' and '_' are needed, and not {', '.join(TAKEN)}"
        )
    return f"{EXTERNAL}/{name}/" if name else f"{EXTERNAL}/"


def file_prefix(prefix: str) -> str:
    """What the names of files begin with: "external_" for "external/"."""
    return prefix.replace("/", "_")


def _choose_name(table: str, record: Mapping[str, Results]) -> str:
    """The name that the cohort of `table` has in the record, or a new one; "" if no cohort without a name is there."""
    tables = {entry: results.source.table for entry, results in record.items() if entry.split("/")[0] == EXTERNAL}
    for entry, other in tables.items():
        if os.path.abspath(other) == os.path.abspath(table):
            return entry.partition("/")[2]
    if EXTERNAL not in tables:
        return ""
    folder = re.sub(r"[^\w.-]", "_", Path(table).absolute().parent.name)
    candidates = (folder if number == 1 else f"{folder}_{number}" for number in count(1))
    name = next(name for name in candidates if f"{EXTERNAL}/{name}" not in tables and _is_usable(name))
    log.warning(
        "external/ contains the results of %s: those of %s are named external/%s/ (evaluation.external.name=NAME "
        "chooses another name)",
        tables[EXTERNAL], table, name,
    )  # fmt: skip
    return name


def _is_usable(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*", name) is not None and name not in TAKEN
