"""Files that are there as a whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

UNFINISHED = ".*.writing-*"
"""What a killed process can leave in a folder, as `Path.glob` takes it."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a hidden file beside `path` for writing; without an error it takes that name once it is on the disk.

    So the name always stands for the whole old or the whole new content. Every writer has a file of its own, and two
    that write at once do not mix. Who may read the file the umask decides, as of any file. Only a killed process leaves
    its part, `.NAME.writing-...`, which may be deleted.

    Raises:
        OSError: The file cannot be written; the message names `path`.
    """
    unfinished = path.with_name(f".{path.name}.writing-{uuid.uuid4().hex[:8]}")
    try:
        opened = unfinished.open("wb")
        try:
            with opened as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)  # gone already where all went well
    except (OSError, RuntimeError) as error:
        # torch.save tells of a full disk by a RuntimeError about positions in the file.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        # What names another file, or no error of the system, is not about this one.
        if not isinstance(cause, OSError) or cause.errno is None or cause.filename not in (None, str(unfinished)):
            raise
        raise OSError(f"cannot write {path}: {cause.strerror}") from error
