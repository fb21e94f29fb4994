"""A file that a reader sees whole: the old one or the new one."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

from .failures import Failure, reason


def write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Writes beside `path`, then renames: a reader sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise Failure(f"cannot write {path}: {reason(error)}.") from error
