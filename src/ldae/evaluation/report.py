"""metrics.json, the table on the console, and report.html, one file that needs nothing else."""

import base64
import html
import math
import re
from collections.abc import Mapping
from pathlib import Path

from ldae.files import read_json, write_json, write_text

NOTES = {
    "cv/transductive/": "cv/transductive: folds of scans that the encoder saw, without labels.",
    "cv/inductive/": "cv/inductive: folds of scans that the encoder never saw.",
}
_SUFFIX = re.compile(r"_(low|high)$")


def merge_metrics(path: Path, new: Mapping[str, float]) -> dict[str, float]:
    """Merge `new` into the flat JSON at `path`, atomically; numbers without a value (NaN, infinite) are left out.

    An evaluation that ran before and is not run now keeps its numbers; one that is run again replaces them.
    """
    merged = read_json(path) if path.exists() else {}
    for name, value in new.items():
        merged.pop(name, None)
        if math.isfinite(value):
            merged[name] = float(value)
    write_json(path, merged)
    return merged


def with_intervals(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(name, "value [low, high]") of every metric, in order; the interval where there is one."""
    rows = []
    for name in sorted(metrics):
        stem = _SUFFIX.sub("", name)
        if stem != name and stem in metrics:
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = f" [{_short(low)}, {_short(high)}]" if low is not None and high is not None else ""
        rows.append((name, _short(metrics[name]) + interval))
    return rows


def _short(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def console_table(metrics: Mapping[str, float]) -> str:
    """Two aligned columns, for the log."""
    rows = with_intervals(metrics)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def write_report(folder: Path, title: str, metrics: Mapping[str, float]) -> Path:
    """Write `folder`/report.html: the numbers by first part of their name, then every PNG of the folder, embedded."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in with_intervals(metrics):
        groups.setdefault(name.split("/")[0], []).append((name, value))
    parts = [f"<h1>{html.escape(title)}</h1>", "<p>In brackets: 95 % intervals of a bootstrap over subjects.</p>"]
    parts += [f"<p>{NOTES[stem]}</p>" for stem in NOTES if any(name.startswith(stem) for name in metrics)]
    for group, rows in groups.items():
        cells = "".join(f"<tr><td>{html.escape(n)}</td><td>{html.escape(v)}</td></tr>" for n, v in rows)
        parts.append(f"<h2>{html.escape(group)}</h2><table>{cells}</table>")
    for image in sorted((*folder.glob("*.png"), *folder.glob("*.gif"))):
        data = base64.b64encode(image.read_bytes()).decode("ascii")
        name = html.escape(image.stem)
        source = f"data:image/{image.suffix[1:]};base64,{data}"
        parts.append(f'<figure><img alt="{name}" src="{source}"><figcaption>{name}</figcaption></figure>')
    style = (
        "body{font:14px sans-serif;max-width:70em;margin:2em auto}td{padding:1px 1em 1px 0;font-family:monospace}"
        "img{max-width:100%}figure{display:inline-block;margin:1em 1em 0 0}"
    )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    path = folder / "report.html"
    write_text(path, f"<!doctype html>\n<html><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n")
    return path
