"""The first screen of report.html, put together."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from ldae.evaluation.first_screen.bars import render_headline
from ldae.evaluation.first_screen.cautions import Evidence, find_cautions
from ldae.evaluation.first_screen.counterfactual import find_counterfactual
from ldae.evaluation.first_screen.facts import TrainingFacts
from ldae.evaluation.first_screen.headlines import choose_headlines
from ldae.evaluation.first_screen.slider import render_script, render_slider
from ldae.utils.results_record import Results

WHAT = (
    "A latent diffusion autoencoder of 3D brain MRI: it summarises a scan as a vector y, from which the scan can be "
    "decoded, varied and edited."
)
NOT_MEDICAL = "For research only: nothing here is a statement about a person's health."
SHOWN = 12  # cautions that are shown without opening anything


def render_first_screen(
    folder: Path,
    title: str,
    metrics: Mapping[str, float],
    files: Sequence[str],
    record: Mapping[str, Results],
    facts: TrainingFacts | None = None,
) -> str:
    """Everything above the sections.

    Args:
        files: names of the files in `folder` that belong to the present results.
        record: what was computed from what, by which command; may be empty.
        facts: what was trained on whom; None: not known.
    """
    edit = find_counterfactual(folder, files, metrics)
    tiles = "".join(render_headline(headline) for headline in choose_headlines(metrics))
    numbers = tiles or "<p>No headline number was measured; the sections below show what was.</p>"
    sentences = [WHAT, *(facts.sentences() if facts else _sentences_of_record(record)), NOT_MEDICAL]
    parts = [
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(" ".join(sentences))}</p></header>',
        f'<div class="screen{"" if edit else " without-edit"}">',
        f'<section class="numbers" aria-label="Headline numbers"><div class="tiles">{numbers}</div></section>',
        render_slider(edit) if edit else "",
        _cautions(metrics, facts),
        "</div>",
        _commands(record),
        render_script() if edit else "",
    ]
    return "\n".join(part for part in parts if part)


def _sentences_of_record(record: Mapping[str, Results]) -> list[str]:
    """How many scans were looked at, where what was trained is not known."""
    scans = max((sum(results.source.scans.values()) for results in record.values()), default=0)
    return [f"Computed from {scans:,} scans."] if scans else []


def _cautions(metrics: Mapping[str, float], facts: TrainingFacts | None) -> str:
    sentences = [f"<li>{escape(sentence)}</li>" for sentence in find_cautions(Evidence(metrics, facts))]
    if not sentences:
        return ""
    shown, more = "".join(sentences[:SHOWN]), "".join(sentences[SHOWN:])
    folded = f"<details><summary>{len(sentences) - SHOWN} more</summary><ul>{more}</ul></details>" if more else ""
    return (
        '<section class="cautions" aria-labelledby="cautions-title"><h2 id="cautions-title">What not to trust here</h2>'
        f"<ul>{shown}</ul>{folded}</section>"
    )


def _commands(record: Mapping[str, Results]) -> str:
    """The commands that computed what is shown, absolute paths shortened to their last part."""
    commands = list(dict.fromkeys(results.command for results in record.values() if results.command))
    if not commands:
        return '<p class="made">The command that made this was not recorded.</p>'
    lines = "\n".join(escape(shorten_paths(command)) for command in commands)
    return f'<p class="made">Made by</p><pre>{lines}</pre>'


def shorten_paths(command: str) -> str:
    """`command` without the folders of absolute paths, which tell a reader nothing and may tell too much."""
    return re.sub(r"(?<![\w.~-])/(?:[^/\s'\"=\[\],]+/)+", "…/", command)
