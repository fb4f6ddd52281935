"""Headlines as small bars with intervals, in SVG that is part of the page."""

import re
from html import escape

from ldae.evaluation.first_screen.headlines import Headline, Value

WIDTH, HEIGHT = 240, 16


def render_headline(headline: Headline) -> str:
    """The number, two bars on one axis, and in words what they say."""
    ours, other = headline.ours, headline.other
    bars = [_bar_row(headline, ours, "ours")]
    if other is not None:
        bars.append(_bar_row(headline, other, "other"))
    axis = f"<span>{headline.start:g}</span><span>{headline.end:.3g}</span>"
    verdict = f'<p class="verdict">{escape(_minus(headline.verdict))}</p>' if headline.verdict else ""
    return (
        f'<article class="tile"><h3>{escape(headline.title)}</h3>'
        f'<p class="number">{escape(_minus(f"{ours.value:.3g}"))}</p><p class="unit">{escape(headline.unit)}</p>'
        f'{"".join(bars)}<p class="axis" aria-hidden="true">{axis}</p>{verdict}'
        f'<p class="key"><code>{escape(headline.key)}</code></p></article>'
    )


def _bar_row(headline: Headline, value: Value, kind: str) -> str:
    text = _minus(value.text)
    label = f"{value.label}: {text}"
    return (
        f'<p class="bar-label"><span>{escape(value.label)}</span> <b>{escape(text)}</b></p>'
        f'<svg class="bar {kind}" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{_shapes(headline, value)}</svg>'
    )


def _minus(text: str) -> str:
    """Numbers with a minus sign instead of a hyphen."""
    return re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", text)


def _shapes(headline: Headline, value: Value) -> str:
    def x(number: float) -> float:
        """Position on the axis, within its ends."""
        share = (number - headline.start) / (headline.end - headline.start)
        return round(WIDTH * min(max(share, 0.0), 1.0), 1)

    shapes = [
        f'<rect class="track" x="0" y="2" width="{WIDTH}" height="{HEIGHT - 4}"/>',
        f'<rect class="fill" x="0" y="2" width="{x(value.value)}" height="{HEIGHT - 4}"/>',
    ]
    if value.low is not None and value.high is not None:
        low, high, middle = x(value.low), x(value.high), HEIGHT / 2
        shapes.append(
            f'<path class="whisker" d="M{low} {middle}H{high}M{low} {middle - 4}V{middle + 4}'
            f'M{high} {middle - 4}V{middle + 4}"/>'
        )
    return "".join(shapes)
