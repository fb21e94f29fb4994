"""What can go wrong outside the program: one line for the user, never a traceback."""

import errno
import os


class Failure(Exception):
    """A clear sentence for stderr; the program ends with exit code 2."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM came; the message says what is safe and how to go on.

    Like KeyboardInterrupt no `Exception`: nothing on its way takes it for an error.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def reason(error: BaseException) -> str:
    """The cause in a few words, also where a library hides errno in a long text."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        return os.strerror(error.errno) + where
    text = str(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
        if os.strerror(code).lower() in text.lower():
            return os.strerror(code)
    first_line = text.strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line[:160]}"
