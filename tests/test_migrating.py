"""docs/migrating.md names fields that exist."""

import re
from pathlib import Path

from dreambooth_jax.runs.config import FIELDS

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()


def test_every_field_exists_and_no_flag_is_named_twice():
    rows = re.findall(r"^\| (`--.*?) \|(.*?)\|(.*)\|$", PAGE, re.MULTILINE)
    flags = [flag for row in rows for flag in re.findall(r"--\w+", row[0])]
    fields = {field for row in rows for field in re.findall(r"`(\w+)`", row[1])}
    assert len(flags) == len(set(flags)) > 60
    assert fields <= FIELDS.keys()
    assert {field for field in re.findall(r"--config\.(\w+)", PAGE) if field != "FIELD"} <= FIELDS.keys()
    assert all(field.strip() or text.strip() for _, field, text in rows)
