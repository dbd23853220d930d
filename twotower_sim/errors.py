"""The one error that users see: bad input, said in their terms."""


class InputError(Exception):
    """Something the user gave is wrong: a file, a field, a combination.

    The message names the file, the line or path, what was found and what is allowed. The command line
    prints it without a traceback and exits with 2.
    """
