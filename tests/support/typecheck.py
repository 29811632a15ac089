"""The type checkers of the tests, in which an int is a float, as PEP 484 has it: one raises, one warns."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
warned = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=UserWarning))
