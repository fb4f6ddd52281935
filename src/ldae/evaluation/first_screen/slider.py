"""The slider of the first screen: one edited scan, moved along a label, with the volumes beside it."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ldae.evaluation.first_screen.counterfactual import Counterfactual, Structure
from ldae.evaluation.first_screen.pictures import to_data_url

SCRIPT = Path(__file__).with_name("slider.js")
MINUS = "\N{MINUS SIGN}"


def render_slider(edit: Counterfactual) -> str:
    """The edit, shown at its largest alpha until the slider is moved; without scripts it stays there."""
    first, last = len(edit.alphas) - 1, len(edit.alphas) - 1
    states = [describe_state(edit, number) for number in range(len(edit.alphas))]
    frames = "".join(
        f'<img class="frame" alt="{escape(state)}" src="{to_data_url(picture)}"{"" if number == first else " hidden"}>'
        for number, (state, picture) in enumerate(zip(states, edit.pictures, strict=True))
    )
    ticks = "".join(f"<span>{_number(alpha)}</span>" for alpha in edit.alphas)
    low, high = edit.towards
    return (
        '<section class="edit" aria-labelledby="edit-title">'
        f'<h2 id="edit-title">One scan, edited along {escape(edit.label)}</h2>'
        f'<figure><div class="frames">{frames}</div><figcaption>{_caption(edit)}</figcaption></figure>'
        f'<label for="edit-alpha">Move from {escape(low)} to {escape(high)}</label> '
        f'<output for="edit-alpha">{escape(states[first].split(":")[0])}</output>'
        f'<input id="edit-alpha" type="range" min="0" max="{last}" step="1" value="{first}" '
        f"data-states='{escape(json.dumps(states), quote=True)}' aria-valuetext=\"{escape(states[first])}\">"
        f'<p class="ticks" aria-hidden="true">{ticks}</p>{_meaning(edit)}{_table(edit, first)}'
        "<noscript><p>The slider needs JavaScript.</p></noscript></section>"
    )


def render_script() -> str:
    """The script that moves it."""
    return f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>"


def describe_state(edit: Counterfactual, number: int) -> str:
    """One position in words, for those who do not see it: "alpha +1, towards AD: ventricles +12 %"."""
    alpha = edit.alphas[number]
    towards = "unedited" if alpha == 0 else f"towards {edit.towards[alpha > 0]}"
    changes = [f"{one.name} {_percent(one.changes(edit.unedited)[number])}" for one in edit.structures]
    return f"alpha {_number(alpha)}, {towards}" + (f": {', '.join(changes)}" if changes else "")


def _caption(edit: Counterfactual) -> str:
    return (
        f"Scan {escape(edit.scan)}. Above: as decoded; below: its change, red = brighter, blue = darker, full colour "
        f"at {edit.limit:.0f} % of the intensity range. Axial, coronal and sagittal; the subject's left is on the left."
    )


def _meaning(edit: Counterfactual) -> str:
    return f'<p class="note">alpha = 1 is {escape(edit.meaning)}.</p>' if edit.meaning else ""


def _table(edit: Counterfactual, first: int) -> str:
    """Volume and change of each structure, in cells that the script fills."""
    if not edit.structures:
        return '<p class="note">No volumes were measured: the table has no label maps.</p>'
    is_known = any(one.true_changes is not None for one in edit.structures)
    heads = ["measured volume", "cm³", "change", *(["true change"] if is_known else [])]
    rows = "".join(_row(one, edit.unedited, first, is_known) for one in edit.structures)
    note = ' "True change" is what the label truly does to this synthetic subject.' if is_known else ""
    return (
        f'<table class="volumes"><thead><tr>{"".join(f"<th scope=col>{head}</th>" for head in heads)}</tr></thead>'
        f'<tbody>{rows}</tbody></table><p class="note">Of this one scan; the sections below have all scans.{note}</p>'
    )


def _row(one: Structure, unedited: int, first: int, is_known: bool) -> str:
    columns = [[f"{volume / 1000:.1f}" for volume in one.volumes], [_percent(c) for c in one.changes(unedited)]]
    if is_known:
        columns.append([_percent(change) for change in one.true_changes or ()] or ["–"] * len(one.volumes))
    return f"<tr><th scope=row>{escape(one.name)}</th>{''.join(_cell(texts, first) for texts in columns)}</tr>"


def _cell(texts: Sequence[str], first: int) -> str:
    return f"<td data-values='{escape(json.dumps(texts), quote=True)}'>{escape(texts[first])}</td>"


def _percent(change: float) -> str:
    text = "0.0 %" if abs(change) < 0.05 else f"{change:+.1f} %"
    return text.replace("-", MINUS)


def _number(alpha: float) -> str:
    return "0" if alpha == 0 else f"{alpha:+g}".replace("-", MINUS)
