"""The page for quality control, qc.html: one row for each scan, worst first, with picture, measures and notes.

The page is a single file that needs no other for up to EMBEDDED scans. The pictures of further scans are links to files
in figures/.
"""

import base64
import html
from pathlib import Path
from urllib.parse import quote

import numpy as np

from ldae.preprocessing.outputs import Record
from ldae.utils.files import write_text

# Measure -> heading, factor, and whether high (1), low (-1) or both kinds of values (0) are bad.
MEASURES = {
    "template_correlation": ("correlation with template", 1.0, -1),
    "head_mm3": ("brain with CSF, cm³", 1e-3, 0),
    "noise": ("noise / brain median", 1.0, 1),
}
EMBEDDED = 2000  # worst scans whose pictures are inside the page, which then has about 100 MB
STYLE = (
    "body{font:14px sans-serif;margin:1em 2em;background:#111;color:#ddd}td,th{padding:4px 1em;vertical-align:top;"
    "text-align:left}img{display:block}.bad{color:#f66}.brain{color:#ff4646}.template{color:#46c8ff}"
)


def write_quality_page(out: Path, records: list[Record]) -> Path:
    """Write OUT/qc.html: rejected scans first, then the others by the deviation of their worst measure."""
    scores = deviation_scores(records)
    order = np.argsort(-scores, kind="stable")
    headings = "".join(f"<th>{heading}</th>" for heading, _, _ in MEASURES.values())
    rows = "\n".join(
        _format_row(out, records[index], scores[index], number < EMBEDDED) for number, index in enumerate(order)
    )
    rejected = sum(record["status"] != "done" for record in records)
    text = (
        f'<!doctype html>\n<html><head><meta charset="utf-8"><title>Quality of {len(records)} scans</title>'
        f"<style>{STYLE}</style></head><body>\n<h1>{len(records)} scans, {rejected} rejected</h1>\n"
        '<p>Worst first. Contours: <span class="brain">brain mask</span>, '
        '<span class="template">brain of the template</span>. Deviation: distance of the worst measure from the '
        "cohort's median, in robust standard deviations.</p>\n"
        f"<table><tr><th>scan</th><th>deviation</th>{headings}<th></th></tr>\n{rows}\n</table></body></html>\n"
    )
    write_text(out / "qc.html", text)
    return out / "qc.html"


def deviation_scores(records: list[Record]) -> np.ndarray:
    """Largest deviation of each scan's measures from the cohort's medians, (N,); infinite for rejected scans.

    Deviations count in the bad direction of a measure only, in robust standard deviations (1.4826 times the median
    absolute deviation).
    """
    result = np.zeros(len(records))
    for name, (_, _, sign) in MEASURES.items():
        values = np.array([record.get("measures", {}).get(name, np.nan) for record in records], dtype=float)
        known = np.isfinite(values)
        if known.sum() < 2:
            continue
        centred = values - np.median(values[known])
        robust_std = 1.4826 * np.median(np.abs(centred[known])) or 1.0
        worse = np.abs(centred) if sign == 0 else sign * centred
        result = np.fmax(result, worse / robust_std)
    result[[record["status"] != "done" for record in records]] = np.inf
    return result


def _format_row(out: Path, record: Record, score: float, embedded: bool) -> str:
    name = html.escape(" ".join(part for part in (record["subject"], record["session"]) if part))
    values = record.get("measures", {})
    cells = "".join(
        f"<td>{values[key] * factor:.4g}</td>" if key in values else "<td></td>"
        for key, (_, factor, _) in MEASURES.items()
    )
    if record["status"] != "done":
        reason = f'<span class="bad">rejected: {html.escape(record["reason"])}</span>'
        return f"<tr><td>{name}</td><td></td>{cells}<td>{reason}</td></tr>"
    notes = [*record["notes"], *(f"{Path(source).name}: {reason}" for source, reason in record["left_out"])]
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    figure = record["files"]["figure"]
    picture = _embed_image(out / figure) if embedded else f'<img alt="slices" src="{quote(figure)}" loading="lazy">'
    return f"<tr><td>{name}</td><td>{score:.1f}</td>{cells}<td>{picture}{notes}</td></tr>"


def _embed_image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="slices" src="data:image/jpeg;base64,{data}">'
