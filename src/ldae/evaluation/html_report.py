"""report.html: all evaluations of a run in one self-contained file.

The first screen (first_screen/) says what was trained on whom, what it can and what not to trust. Each section below it
(report_sections.py) shows its question, its figures, animations and viewers, and its metrics with their names in words.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from ldae.evaluation.comparisons import Comparison, compare_in_words
from ldae.evaluation.first_screen.facts import TrainingFacts
from ldae.evaluation.first_screen.screen import render_first_screen
from ldae.evaluation.metric_words import describe_metric
from ldae.evaluation.report_sections import OTHER, SECTIONS, Section
from ldae.utils.files import write_text
from ldae.utils.metric_table import format_with_intervals
from ldae.utils.results_record import Results, group_by_source

REPORT = "report.html"
MEDIA_TYPES = {".png": "image/png", ".gif": "image/gif"}
MAX_OPEN = 40  # tables with more metrics are folded

INTRODUCTION = (
    "y is a scan's embedding, the vector that the semantic encoder computes from it. z is its latent, the scan as the "
    "autoencoder compresses it. z_T is its code, the noise from which diffusion restores z given y. alpha is the "
    "length of an edit of y. In brackets: 95 % intervals of a bootstrap over subjects. In all pictures the subject's "
    "left is on the left and marked L. For research only: nothing here is a statement about a person's health."
)
STYLE = Path(__file__).with_name("report.css")


def write_report(
    folder: Path,
    title: str,
    metrics: Mapping[str, float],
    record: Mapping[str, Results] | None = None,
    facts: TrainingFacts | None = None,
) -> Path:
    """Write `folder`/report.html from `metrics` and the figures and viewers in `folder`; returns its path.

    Args:
        record: which files are shown, what they were computed from and what was skipped; None shows all files.
        facts: what was trained on whom; None: not known.
    """
    paths = sorted(folder.iterdir())
    if record is not None:
        shown_files = {file for results in record.values() for file in results.files}
        paths = [path for path in paths if path.name in shown_files]
    rows, files = _sort_into_sections(metrics, paths)
    shown = [section for section in (*SECTIONS, OTHER) if rows[section.title] or files[section.title]]
    links = "".join(f'<a href="#{_anchor(section)}">{escape(section.title)}</a>' for section in shown)
    names = [path.name for path in paths]
    parts = [
        render_first_screen(folder, title, metrics, names, record or {}, facts),
        f"<nav>{links}</nav>",
        f'<p class="note">{escape(INTRODUCTION)}</p>',
        *(_section(section, rows[section.title], files[section.title], metrics) for section in shown),
        _describe_sources(record or {}),
    ]
    path = folder / REPORT
    write_text(path, _page(title, "\n".join(parts)))
    return path


def _page(title: str, body: str) -> str:
    style = STYLE.read_text(encoding="utf-8")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _describe_sources(record: Mapping[str, Results]) -> str:
    """What the numbers were computed from, and what was not computed."""
    sources = [f"{', '.join(names)}: {source.description}" for source, names in group_by_source(record)]
    skipped = list(dict.fromkeys(text for results in record.values() for text in results.skipped))
    return _list("Computed from", sources) + _list("Not computed", skipped)


def _list(heading: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<p>{heading}:</p><ul>{items}</ul>" if lines else ""


def _sort_into_sections(
    metrics: Mapping[str, float], paths: Sequence[Path]
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, list[Path]]]:
    """Metrics (name, value in words) and files of each section, by its title."""
    titles = [section.title for section in (*SECTIONS, OTHER)]
    rows: dict[str, list[tuple[str, str]]] = {title: [] for title in titles}
    files: dict[str, list[Path]] = {title: [] for title in titles}
    for name, value in format_with_intervals(metrics):
        section = next((section for section in SECTIONS if section.has_metric(name)), OTHER)
        rows[section.title].append((name, value))
    for path in paths:
        if path.suffix in MEDIA_TYPES or (path.suffix == ".html" and path.name != REPORT):
            files[_section_of_figure(path).title].append(path)
    return rows, files


def _section_of_figure(path: Path) -> Section:
    """By the beginning of its name if a section knows that, otherwise by the end."""
    by_prefix = (section for section in SECTIONS if path.stem.startswith(tuple(section.prefixes)))
    by_suffix = (section for section in SECTIONS if path.stem.endswith(tuple(section.suffixes)))
    return next(by_prefix, None) or next(by_suffix, OTHER)


def _anchor(section: Section) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in section.title.lower())


def _section(
    section: Section, rows: Sequence[tuple[str, str]], files: Sequence[Path], metrics: Mapping[str, float]
) -> str:
    heading = f'<h2 id="{_anchor(section)}">{escape(section.title)}</h2>'
    parts = ['<section class="part">', heading, f"<p>{escape(section.text)}</p>"]
    parts += [_comparison(one) for one in compare_in_words({n: v for n, v in metrics.items() if section.has_metric(n)})]
    parts += [_figure(path) for path in files if path.suffix in MEDIA_TYPES]
    parts += [_viewer(path) for path in files if path.suffix == ".html"]
    if rows:
        is_open = " open" if len(rows) <= MAX_OPEN else ""
        parts.append(f"<details{is_open}><summary>{len(rows)} metrics</summary>{_table(rows, section)}</details>")
    return "\n".join([*parts, "</section>"])


def _comparison(comparison: Comparison) -> str:
    """Predictors of one label, the best first, and how y compares with each."""
    cells = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in comparison.rows)
    heading = f"{comparison.title}{f' ({comparison.prefix})' if comparison.prefix else ''}"
    return f'<h3>{escape(heading)}</h3><div class="wide"><table>{cells}</table></div>'


def _table(rows: Sequence[tuple[str, str]], section: Section) -> str:
    """Every metric in words, its value, and its name in metrics.json."""
    cells = "".join(
        f'<tr><td>{escape(describe_metric(name, section.terms))}</td><td class="value">{escape(text)}</td>'
        f"<td><code>{escape(name)}</code></td></tr>"
        for name, text in rows
    )
    head = "<thead><tr><th scope=col>what</th><th scope=col>value</th><th scope=col>name</th></tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{cells}</tbody></table></div>'


def _figure(path: Path) -> str:
    data, words = base64.b64encode(path.read_bytes()).decode("ascii"), escape(path.stem.replace("_", " "))
    source = f"data:{MEDIA_TYPES[path.suffix]};base64,{data}"
    return f'<figure><img alt="Figure: {words}" src="{source}"><figcaption>{escape(path.name)}</figcaption></figure>'


def _viewer(path: Path) -> str:
    """A page of utils/html_viewer.py in a frame of its own, so that its scripts cannot see the report."""
    page, name = escape(path.read_text(encoding="utf-8")), escape(path.name)
    frame = f'<iframe sandbox="allow-scripts" loading="lazy" srcdoc="{page}"></iframe>'
    return f"<details><summary>interactive viewer: {name}</summary>{frame}</details>"
