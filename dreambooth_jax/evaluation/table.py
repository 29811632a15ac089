"""Tables of scores, Markdown and JSON: one protocol per table, quoted rows ruled off."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dreambooth_jax.evaluation.metrics import Interval

Value = Interval | float | None


class Row(NamedTuple):
    """A row of a table: `values` may lack columns; `protocol` is that of the numbers."""

    label: str
    protocol: str
    values: Mapping[str, Value]


class Quoted(NamedTuple):
    """Rows that others have measured, with their source: shown below a rule, never compared."""

    source: str
    rows: Mapping[str, Mapping[str, Value]]


def markdown(rows: Sequence[Row], columns: Sequence[str], quoted: Quoted | None = None) -> str:
    """A Markdown table with intervals, the protocol below it.

    Raises:
        ValueError: rows of different protocols; names them.
    """
    protocol = one_protocol(rows)
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [_line(row.label, [_cell(row.values.get(column)) for column in columns]) for row in rows]
    if quoted is not None:
        lines.append(_line(f"**{quoted.source}**", [""] * len(columns)))
        lines += [_line(label, [_cell(values.get(c)) for c in columns]) for label, values in quoted.rows.items()]
    return "\n".join([*lines, "", f"Protocol: {protocol}."])


def as_json(rows: Sequence[Row], quoted: Quoted | None = None) -> dict[str, Any]:
    """The table as plain values.

    Raises:
        ValueError: rows of different protocols.
    """
    table: dict[str, Any] = {
        "protocol": one_protocol(rows),
        "rows": [{"label": row.label, "values": {n: _plain(v) for n, v in row.values.items()}} for row in rows],
    }
    if quoted is not None:
        rows_of = {label: {n: _plain(v) for n, v in values.items()} for label, values in quoted.rows.items()}
        table["quoted"] = {"source": quoted.source, "rows": rows_of}
    return table


def one_protocol(rows: Sequence[Row]) -> str:
    """The protocol of all rows.

    Raises:
        ValueError: rows of different protocols, whose numbers cannot be compared; or no rows.
    """
    protocols = sorted({row.protocol for row in rows})
    if len(protocols) != 1:
        listed = "".join(f"\n  {protocol}" for protocol in protocols)
        raise ValueError(f"a table holds numbers of one protocol, got {len(protocols)}:{listed}")
    return protocols[0]


def _line(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


def _cell(value: Value) -> str:
    if value is None:
        return ""
    if not isinstance(value, Interval):
        return f"{value:.3f}"
    return f"{value.mean:.3f}" + (f" [{value.low:.3f}, {value.high:.3f}]" if value.low < value.high else "")


def _plain(value: Value) -> Any:
    return value._asdict() if isinstance(value, Interval) else value
