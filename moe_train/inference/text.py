"""Tokens of a continuation to text, piece by piece, up to a stop string. No torch import."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

_CONTEXT = 6
"""Tokens of the prompt that are decoded with the first new ones: some decoders drop a space at the start of a text."""
_REPLACEMENT = "\ufffd"
_LONGEST_TAIL = 3
"""Replacement characters at the end of a text that may become one character: UTF-8 has up to 4 bytes of it."""
_LONGEST_WINDOW = 16
_KEPT = 8
"""Tokens that remain of a longer window."""


def is_unicode(value: Any) -> bool:
    """Whether all texts in a JSON value can be encoded. The escape of half a surrogate pair is valid JSON only."""
    pending = [value]
    while pending:  # not recursive: the depth is the author's choice
        one = pending.pop()
        if isinstance(one, dict):
            pending += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            pending += one
        elif isinstance(one, str):
            try:
                one.encode()
            except UnicodeEncodeError:
                return False
    return True


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""


class IncrementalDecoder:
    """Decodes one token at a time. The pieces add up to the text of all tokens; none ends within a character.

    Only the last tokens are decoded again, as many as have an incomplete character.

    Args:
        prompt: tokens before the first; their text is not returned.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt[-_CONTEXT:])
        self._sent = _certain(self._decoded())
        self._complete = len(self._window)  # tokens of the window whose text is complete

    def push(self, token: int) -> str:
        """The text that is certain with the next token."""
        self._window.append(token)
        text = self._decoded()
        end = _certain(text)
        is_complete = end == len(text)
        if not is_complete and not _certain(self._tokenizer.decode(self._window[self._complete :])):
            # SentencePiece's byte fallback: an incomplete character also replaces complete ones right before it.
            end = self._sent
        piece = text[self._sent : end]
        self._sent = max(self._sent, end)
        if is_complete:
            # What came before the previous complete text changes nothing any more.
            del self._window[: self._complete]
            self._complete = len(self._window)
            self._sent = len(self._decoded())
        elif len(self._window) > _LONGEST_WINDOW:
            self._trim(text[self._sent :])
        return piece

    def _trim(self, pending: str) -> None:
        """Drop the oldest tokens of a long run of incomplete characters, such as random bytes.

        A character has at most 4 bytes. Wherever the window begins, decoding is in step again after 3 of them.

        Args:
            pending: the text that is not certain yet.
        """
        shorter = self._window[-_KEPT:]
        text = self._tokenizer.decode(shorter)
        sent = len(text) - len(pending)
        if sent >= _LONGEST_TAIL and text.endswith(pending):
            self._window, self._sent, self._complete = shorter, sent, 0

    def flush(self) -> str:
        """The rest, with replacement characters where bytes are missing."""
        piece = self._decoded()[self._sent :]
        self._sent += len(piece)
        return piece

    def _decoded(self) -> str:
        return self._tokenizer.decode(self._window)


def _certain(text: str) -> int:
    """Characters of `text` that further tokens do not change."""
    end = len(text)
    while end and len(text) - end < _LONGEST_TAIL and text[end - 1] == _REPLACEMENT:
        end -= 1
    return end


class StopStrings:
    """Finds the first stop string in text that comes in pieces. Text is kept back while it may be part of one.

    Args:
        stop: strings that are not empty.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that comes before any stop string. After the first one there is none."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(text.find(stop) + len(stop), len(stop)) for stop in self._stop if stop in text]
        if ends:
            end, length = min(ends, key=lambda pair: (pair[0], -pair[1]))
            self.found, self._held = True, ""
            return text[: end - length]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What was kept back, which is not a stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` may begin."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """The text of one continuation.

    Args:
        prompt: its tokens.
        stop: strings that end the text and are not part of it.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._decoder, self._stop = IncrementalDecoder(tokenizer, prompt), StopStrings(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.found

    def push(self, token: int) -> str:
        """The text that is certain with the next token."""
        return self._stop.push(self._decoder.push(token))

    def end(self) -> str:
        """The rest of the text."""
        if self.stopped:
            return ""
        return self._stop.push(self._decoder.flush()) + self._stop.flush()
