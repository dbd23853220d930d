"""The one error that users see: bad input, said in their terms."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Something the user gave is wrong: a file, a field, a combination.

    The message names the file, the line or path, what was found and what is allowed. The command line
    prints it without a traceback and exits with 2.
    """


@contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """Around imports that ``what`` needs: a missing one is an InputError that names the extra that has it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"{what} needs {error.name}: pip install 'twotower-sim[{extra}]'") from None
