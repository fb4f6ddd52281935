"""`python -m ldae.bench.gpu_check [--budget SECONDS] [--parts A,B/ITEM*] [--out DIR] [--size full|smoke]`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ldae.bench.gpu_check.check import FULL, SMOKE
from ldae.bench.gpu_check.parts import PARTS
from ldae.bench.gpu_check.run import run_check
from ldae.utils.errors import EXIT_USER_ERROR, UserError

log = logging.getLogger(__name__)
SIZES = {"full": FULL, "smoke": SMOKE}


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m ldae.bench.gpu_check", description=__doc__)
    add = parser.add_argument
    add("--budget", type=float, default=480, metavar="SECONDS", help="for all of it (default: 480)")
    add("--parts", default=",".join(PARTS), help="parts, or part/item with *, in the order of running")
    add("--out", type=Path, default=Path("runs/gpu_check"), help="folder for the results")
    add("--size", choices=SIZES, default="full", help="smoke: seconds on a CPU, to try the check")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the check. A failed measurement is reported in the results and by exit status 1."""
    given = build_parser().parse_args(arguments)
    # Only this check logs its lines; the reports of the trainings would hide them.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger("ldae.bench").setLevel(logging.INFO)
    try:
        failed = run_check(SIZES[given.size], given.parts.split(","), given.out, given.budget)
    except UserError as error:
        log.error("%s", error)
        sys.exit(EXIT_USER_ERROR)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main()
