"""CSV files as people, spreadsheets and this library write them: the one reader of all."""

import csv
import io
import os
from typing import NamedTuple


class Table(NamedTuple):
    """A table with a header.

    Attributes:
        columns: names in the header.
        rows: number of the line -> column -> text; None where the line is too short.
    """

    columns: tuple[str, ...]
    rows: dict[int, dict[str, str | None]]


def read_lines(text: str, path: str | os.PathLike) -> dict[int, list[str]]:
    """Number of the line -> cells, without empty lines; lines end as on Linux, Windows or the classic Mac.

    Args:
        path: name of the file in errors.

    Raises:
        ValueError: a line is no CSV, or a cell is too long; names the line.
    """
    reader = csv.reader(io.StringIO(text, newline=None))
    lines = {}
    try:
        for row in reader:
            if row:
                lines[reader.line_num] = row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not readable as CSV ({error})") from error
    return lines


def read_table(text: str, path: str | os.PathLike) -> Table:
    """A text whose first line is a header; blank cells at the end of a line are left out.

    Args:
        path: name of the file in errors.

    Raises:
        ValueError: see `read_lines`; or a line has more cells than the header.
    """
    header, *lines = read_lines(text, path).items() or [(1, [])]
    columns = tuple(header[1])
    longer = [str(number) for number, cells in lines if any(cells[len(columns) :])]
    if longer:
        raise ValueError(
            f"{path}, line {', '.join(longer)}: more cells than the columns {', '.join(columns)}. Put a text that "
            'contains commas into double quotes: "a dog, sitting"'
        )
    absent = [None] * len(columns)
    return Table(columns, {number: dict(zip(columns, [*cells, *absent], strict=False)) for number, cells in lines})
