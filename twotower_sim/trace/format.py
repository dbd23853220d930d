"""Which format a trace is read in, as it is asked for."""

from collections.abc import Mapping

from twotower_sim.errors import InputError
from twotower_sim.readers import FORMATS, Format
from twotower_sim.readers.columns import Columns, TimeUnit
from twotower_sim.yaml_file import did_you_mean

FIELDS = {
    "arrival": True,
    "input_tokens": True,
    "output_tokens": True,
    "first_token": False,
    "finish": False,
    "session": False,
}
"""Whether a column has to be named."""


def format_of(name: str, columns: Mapping[str, str], time_unit: TimeUnit | None) -> Format:
    """``columns``: by field of FIELDS; none for the format's own. Raises InputError."""
    if name != "auto" and name not in FORMATS:
        raise InputError(
            f"--format: found {name!r:.99}{did_you_mean(name, FORMATS)}; allowed: auto, {', '.join(FORMATS)}"
        )
    if not columns:
        if time_unit:
            raise InputError("--time-unit: has no effect without --column; formats have units of their own")
        return name
    if name not in ("auto", "columns"):
        raise InputError(f"--format: found {name!r}; with --column it is columns, or left out")
    for field, column in columns.items():
        if field not in FIELDS or not column:
            raise InputError(
                f"--column: found {field}={column}{did_you_mean(field, FIELDS)}; allowed: {', '.join(FIELDS)}=NAME"
            )
    if missing := [field for field, needed in FIELDS.items() if needed and field not in columns]:
        raise InputError(f"--column: {missing[0]}=NAME is missing")
    return Columns(**columns, time_unit=time_unit or "s")
