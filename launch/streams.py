"""Standard output and error that a full disk does not turn into the end of a run."""

from __future__ import annotations

import errno
import sys
from typing import Any

_BORNE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


class _Tolerant:
    """A text stream that loses what cannot be written. A closed pipe is still an error: its reader wanted the end."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`, if that is possible."""
        try:
            return int(self._stream.write(text))
        except OSError as error:
            if error.errno not in _BORNE:
                raise
            return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        try:
            self._stream.flush()
        except OSError as error:
            if error.errno not in _BORNE:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tolerate() -> None:
    """Let this process continue where its output, most often a log in run_dir, cannot be written."""
    if not isinstance(sys.stdout, _Tolerant):
        sys.stdout = _Tolerant(sys.stdout)
    if not isinstance(sys.stderr, _Tolerant):
        sys.stderr = _Tolerant(sys.stderr)
