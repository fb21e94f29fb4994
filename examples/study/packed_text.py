"""Reads the texts that lie packed in `data/`."""

import lzma
import pathlib

from language_model.failures import Failure, reason


def read_text(path: pathlib.Path) -> tuple[str, bytes]:
    """The text of a file, and the bytes of the file itself, to know it again by."""
    try:
        raw = path.read_bytes()
        return lzma.decompress(raw).decode("utf-8"), raw
    except OSError as error:
        raise Failure(f"cannot read {path}: {reason(error)}.") from error
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise Failure(f"cannot read {path}: it is not a whole xz text.") from error
