"""Scores as one HTML file that needs no network: tables with intervals, curves over steps, pictures, and how to repeat
it."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dreambooth_jax.evaluation.metrics import Interval
from dreambooth_jax.evaluation.scores import MEASURES, Scores
from dreambooth_jax.evaluation.table import Quoted, Row, one_protocol
from dreambooth_jax.evaluation.transforms import Picture

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1b1b1b;background:#fff;max-width:62rem;margin:auto;padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}img{max-width:100%;height:auto}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
td,th{padding:.3rem .6rem;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}tr.rule td{border-top:2px solid #1b1b1b;font-weight:600;text-align:left}
small{color:#666}pre{background:#f5f5f5;padding:.8rem;overflow-x:auto;font-size:.85rem}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:1rem}figure{margin:0}
.warn{background:#fff3d6;padding:.6rem .8rem;border-left:4px solid #d99000}
"""


class Section(NamedTuple):
    """One checkpoint or subject of a page.

    Attributes:
        row: its row of the table.
        scores: with what the row lacks: bounds and copies.
        step: of training, for the curves.
        sheet: all pictures with their prompts.
        copies: the closest pairs, the photo beside each picture; None for none.
    """

    row: Row
    scores: Scores
    step: int
    sheet: Picture
    copies: Picture | None


def page(
    title: str,
    judge: str,
    sections: Sequence[Section],
    *,
    summary: Sequence[Row] = (),
    quoted: Quoted | None = None,
    notes: Mapping[str, str] | None = None,
) -> str:
    """The HTML text.

    Args:
        judge: who judges, for a person.
        sections: checkpoints or subjects, in the order of the page.
        summary: rows above those of the sections, such as means over subjects.
        quoted: rows that others have measured.
        notes: title -> preformatted text, such as the config or the command.

    Raises:
        ValueError: rows of different protocols.
    """
    rows = [*summary, *(section.row for section in sections)]
    protocol = one_protocol(rows)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>Judged by {html.escape(judge)}. Means with 95 % bootstrap intervals; &#8593; more is better, &#8595; less "
        "is better.</p>",
        _table(rows, quoted),
        f"<p><small>Protocol: {html.escape(protocol)}.</small></p>",
        _meanings(),
    ]
    if len({section.step for section in sections}) > 1:
        body += ["<h2>Over steps</h2>", _curves(sections)]
    for section in sections:
        body += _section(section)
    for name, text in (notes or {}).items():
        body.append(f"<h2>{html.escape(name)}</h2><pre>{html.escape(text)}</pre>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _table(rows: Sequence[Row], quoted: Quoted | None) -> str:
    columns = [name for name in MEASURES if any(row.values.get(name) is not None for row in rows)]
    arrows = {name: "&#8593;" if MEASURES[name][0] else "&#8595;" for name in columns}
    lines = ["<tr><th></th>" + "".join(f"<th>{name} {arrows[name]}</th>" for name in columns) + "</tr>"]
    lines += [_line(row.label, [_cell(row.values.get(column)) for column in columns]) for row in rows]
    if quoted is not None:
        lines.append(f'<tr class="rule"><td colspan="{len(columns) + 1}">{html.escape(quoted.source)}</td></tr>')
        lines += [_line(label, [_cell(values.get(c)) for c in columns]) for label, values in quoted.rows.items()]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _line(label: str, cells: Sequence[str]) -> str:
    return f"<tr><td>{html.escape(label)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _cell(value: Interval | float | None) -> str:
    if value is None:
        return ""
    if not isinstance(value, Interval):
        return f"{value:.3f}"
    span = f"<br><small>{value.low:.3f} to {value.high:.3f}</small>" if value.low < value.high else ""
    return f"{value.mean:.3f}{span}"


def _meanings() -> str:
    lines = "".join(f"<li><b>{name}</b>: {html.escape(meaning)}</li>" for name, (_, meaning) in MEASURES.items())
    return f"<details><summary>What the columns measure</summary><ul>{lines}</ul></details>"


def _curves(sections: Sequence[Section]) -> str:
    figures = []
    for name in MEASURES:
        points = [(s.step, s.row.values[name]) for s in sections if isinstance(s.row.values.get(name), Interval)]
        if len(points) > 1:
            figures.append(f"<figure><figcaption>{name}</figcaption>{curve(points)}</figure>")
    return f'<div class="curves">{"".join(figures)}</div>'


def curve(points: Sequence[tuple[int, Interval]]) -> str:
    """An SVG line through the means over steps, the intervals as a band."""
    width, height, left, bottom = 220, 110, 40, 16
    steps = [step for step, _ in points]
    low, high = min(p.low for _, p in points), max(p.high for _, p in points)
    span, length = (high - low) or 1.0, (max(steps) - min(steps)) or 1

    def at(step: int, value: float) -> str:
        x = left + (step - min(steps)) / length * (width - left - 6)
        return f"{x:.1f},{6 + (high - value) / span * (height - bottom - 12):.1f}"

    band = [at(step, p.high) for step, p in points] + [at(step, p.low) for step, p in reversed(points)]
    line = [at(step, p.mean) for step, p in points]
    dots = "".join('<circle cx="{}" cy="{}" r="2.5" fill="#2060b0"/>'.format(*dot.split(",")) for dot in line)
    text = f'<text x="0" y="12">{high:.3f}</text><text x="0" y="{height - bottom - 4}">{low:.3f}</text>'
    text += f'<text x="{left}" y="{height - 3}">{min(steps)}</text>'
    text += f'<text x="{width - 4}" y="{height - 3}" text-anchor="end">{max(steps)} steps</text>'
    return (
        f'<svg viewBox="0 0 {width} {height}" font-size="10" fill="#666" role="img">{text}'
        f'<polygon points="{" ".join(band)}" fill="#2060b0" opacity=".15"/>'
        f'<polyline points="{" ".join(line)}" fill="none" stroke="#2060b0" stroke-width="2"/>{dots}</svg>'
    )


def _section(section: Section) -> list[str]:
    scores = section.scores
    bound = ", ".join(f"{name} {value:.3f}" for name, value in scores.bound.items())
    parts = [
        f"<h2>{html.escape(section.row.label)}</h2>",
        f"<p>The photos among themselves: {bound}. Closest generated picture: {scores.values['copy'].mean:.3f}; "
        f"suspected of copying from {scores.limit:.3f} on.</p>",
    ]
    if scores.suspicious:
        parts.append(
            f'<p class="warn">{scores.suspicious:.0%} of the pictures are as similar to a photo as a photo to itself '
            "cropped by a sixteenth: look whether they copy it.</p>"
        )
    if section.copies is not None:
        parts.append(f"<figure>{image(section.copies)}<figcaption>The closest pairs</figcaption></figure>")
    return [*parts, f"<figure>{image(section.sheet)}<figcaption>All pictures</figcaption></figure>"]


def image(picture: Picture) -> str:
    """The picture inside the page, as JPEG of no more than 1024 pixels across."""
    encoded, shown = io.BytesIO(), Image.fromarray(np.ascontiguousarray(picture))
    shown.thumbnail((1024, shown.height), Image.Resampling.LANCZOS)
    shown.save(encoded, "JPEG", quality=88)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}">'
