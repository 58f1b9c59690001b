"""Binary streams of plain, gzip and Zstandard files. A file that ends too early is an error, never a shorter text."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO, cast

_CHUNK_BYTES = 131_072
_LARGEST_WINDOW_BYTES = 2**31  # of files that `zstd --long=31` wrote


def open_binary(file: Path) -> BinaryIO:
    """The uncompressed bytes of `file`, whose suffix tells how it is compressed.

    Raises:
        OSError, EOFError, zlib.error: while reading, where the file is damaged or ends too early.
    """
    if file.name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(file, "rb"))
    if file.name.endswith(".zst"):
        return io.BufferedReader(_Zstandard(file), _CHUNK_BYTES)
    return open(file, "rb")


class _Zstandard(io.RawIOBase):
    """Every frame of a .zst file; zstandard's own reader takes the first frame or an early end for all there is."""

    def __init__(self, file: Path) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW_BYTES)
        self._stream = open(file, "rb")  # noqa: SIM115 - `close` closes it
        self._frame: Any = None  # None between frames
        self._compressed = self._out = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            self._compressed = self._compressed or self._stream.read(_CHUNK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._step()
        count = min(len(buffer), len(self._out))
        buffer[:count], self._out = self._out[:count], self._out[count:]
        return count

    def _step(self) -> None:
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        try:
            self._out = self._frame.decompress(self._compressed)
        except self._error as error:
            raise OSError(str(error)) from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
