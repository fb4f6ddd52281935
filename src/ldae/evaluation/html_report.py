"""report.html: all evaluations of a run in one file that needs nothing else, a section each with its figures.

A section has what it shows in words, its figures and animations, its viewers, and all its numbers.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldae.evaluation.report import format_with_intervals
from ldae.utils.files import write_text

REPORT = "report.html"
IMAGES = {".png": "image/png", ".gif": "image/gif"}


@dataclass(frozen=True)
class Section:
    """groups: first parts of the metrics' names; begins, ends: of the figures' names."""

    title: str
    text: str
    groups: Sequence[str]
    begins: Sequence[str] = ()
    ends: Sequence[str] = ()

    def counts(self, metric: str) -> bool:
        """Whether a number belongs here."""
        return any(metric.startswith(f"{group}/") for group in self.groups)

    def holds(self, path: Path) -> bool:
        """Whether a figure belongs here."""
        return path.stem.startswith(tuple(self.begins)) or path.stem.endswith(tuple(self.ends))


SECTIONS = (
    Section(
        "Another cohort",
        "The frozen encoder, probes and baselines on scans that nothing was fitted on.",
        ("external",),
        ("external_",),
    ),
    Section(
        "What y tells",
        "Linear probes of y on test subjects beside baselines: volumes of structures, PCA of latents, the untrained "
        "encoder, age and sex. A difference is ours minus the baseline, positive = better.",
        ("probe", "baseline"),
        (),
        ("_roc", "_confusion", "_scatter"),
    ),
    Section(
        "Cross-validation, inductive",
        "Folds of scans that the encoder never saw.",
        ("cv/inductive",),
        ("cv_inductive",),
    ),
    Section(
        "Cross-validation, transductive",
        "Folds of scans that the encoder saw, without labels.",
        ("cv/transductive",),
        ("cv_transductive",),
    ),
    Section(
        "Is y used",
        "Errors of the denoised latent with the scan's own y, with another subject's and with none. A probe alone "
        "cannot tell this.",
        ("semantics", "gap"),
        ("semantics", "gap"),
    ),
    Section(
        "Where the encoder looked",
        "Attention over slices: which slices y was read from, not what in them mattered.",
        ("attention",),
        ("attention",),
    ),
    Section(
        "Reconstruction",
        "Scans decoded from their own code and y, and from y alone, against the autoencoder as ceiling.",
        ("reconstruction",),
        ("reconstruction",),
    ),
    Section(
        "Variation",
        "One y decoded with different random codes: where variants differ is what y leaves open.",
        ("variation",),
        ("variation",),
    ),
    Section(
        "Manipulation",
        "Test scans moved along a label's direction. Difference maps: red = brighter, blue = darker, in shares of the "
        "scan's intensity range. An edit shows what the model associates with the label, not what would happen to a "
        "person.",
        ("manipulation",),
        ("manipulation",),
    ),
    Section(
        "Choice of direction and depth",
        "On validation subjects: identity against effect for every estimator and setting.",
        ("selection",),
        ("selection",),
    ),
    Section(
        "Interpolation through time",
        "The visit between two visits, against the real one, beside the nearest visit and blends. A gain is ours minus "
        "the baseline, positive = better.",
        ("interpolation",),
        ("interpolation",),
    ),
    Section("Generation", "Unconditional samples against real scans.", ("generation",), ("generation",)),
)
OTHER = Section("Further numbers", "", ())

STYLE = """
body{font:15px/1.45 sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}
nav a{margin-right:1.2em}h2{border-top:1px solid #ccc;padding-top:.8em;margin-top:1.6em}
td{padding:1px 1em 1px 0;font-family:monospace;font-size:13px}img{max-width:100%}
figure{display:inline-block;margin:1em 1em 0 0;vertical-align:top}figcaption{color:#666;font-size:12px}
iframe{width:100%;height:36em;border:0}summary{cursor:pointer;margin:.6em 0}
"""


def write_report(folder: Path, title: str, metrics: Mapping[str, float]) -> Path:
    """Write `folder`/report.html from `metrics` and the figures and viewers that lie in `folder`."""
    rows, files = _by_section(metrics, folder)
    shown = [section for section in (*SECTIONS, OTHER) if rows[section.title] or files[section.title]]
    links = "".join(f'<a href="#{_anchor(section)}">{html.escape(section.title)}</a>' for section in shown)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        "<p>In brackets: 95 % intervals of a bootstrap over subjects. In all pictures the subject's left is on the "
        "left, marked L. Research only: nothing here speaks about a person's health.</p>",
        f"<nav>{links}</nav>",
        *(_section(section, rows[section.title], files[section.title]) for section in shown),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    path = folder / REPORT
    write_text(path, f"<!doctype html>\n<html><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n")
    return path


def _by_section(
    metrics: Mapping[str, float], folder: Path
) -> tuple[dict[str, list[tuple[str, str]]], dict[str, list[Path]]]:
    """Numbers and files of each section by its title."""
    titles = [section.title for section in (*SECTIONS, OTHER)]
    rows: dict[str, list[tuple[str, str]]] = {title: [] for title in titles}
    files: dict[str, list[Path]] = {title: [] for title in titles}
    for name, value in format_with_intervals(metrics):
        section = next((section for section in SECTIONS if section.counts(name)), OTHER)
        rows[section.title].append((name, value))
    for path in sorted(folder.iterdir()):
        if path.suffix in IMAGES or (path.suffix == ".html" and path.name != REPORT):
            section = next((section for section in SECTIONS if section.holds(path)), OTHER)
            files[section.title].append(path)
    return rows, files


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


def _section(section: Section, rows: Sequence[tuple[str, str]], files: Sequence[Path]) -> str:
    cells = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    parts = [f'<h2 id="{_anchor(section)}">{html.escape(section.title)}</h2>', f"<p>{html.escape(section.text)}</p>"]
    parts += [_figure(path) for path in files if path.suffix in IMAGES]
    parts += [_viewer(path) for path in files if path.suffix == ".html"]
    if cells:
        is_open = "" if len(rows) > 40 else " open"
        parts.append(f"<details{is_open}><summary>{len(rows)} numbers</summary><table>{cells}</table></details>")
    return "\n".join(parts)


def _figure(path: Path) -> str:
    data, name = base64.b64encode(path.read_bytes()).decode("ascii"), html.escape(path.stem)
    source = f"data:{IMAGES[path.suffix]};base64,{data}"
    return f'<figure><img alt="{name}" src="{source}"><figcaption>{name}</figcaption></figure>'


def _viewer(path: Path) -> str:
    """The page of viewer.py inside this one, apart from it: its scripts see nothing of the report."""
    page, name = html.escape(path.read_text(encoding="utf-8")), html.escape(path.stem)
    frame = f'<iframe sandbox="allow-scripts" loading="lazy" srcdoc="{page}"></iframe>'
    return f"<details><summary>viewer: {name}</summary>{frame}</details>"
