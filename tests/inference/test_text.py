"""Text from tokens, piece by piece."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from moe_train.data.tokenizer import Tokenizer, train_tokenizer
from moe_train.inference.text import IncrementalDecoder, StopStrings, TextStream

TEXT = "Äpfel und Birnen: 苹果, 🍏🍐 - naïve café.\n"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["some text with few merges " * 20], 280, path)
    return Tokenizer(path)


class Words:
    """A decoder as of SentencePiece: each token is a word, and the first one has no space before it."""

    def __init__(self) -> None:
        self._library = Library(models.WordLevel({f"▁{c}": i for i, c in enumerate("abcdefgh")}, unk_token="▁a"))
        self._library.decoder = decoders.Metaspace()

    def decode(self, ids: list[int]) -> str:
        return str(self._library.decode(ids))


def pieces(decoder: IncrementalDecoder, ids: list[int]) -> list[str]:
    return [*(decoder.push(token) for token in ids), decoder.flush()]


def test_pieces_add_up_and_none_ends_within_a_character(byte_level: Tokenizer) -> None:
    ids = byte_level.encode(TEXT * 3)
    found = pieces(IncrementalDecoder(byte_level), ids)
    assert "".join(found) == TEXT * 3
    assert not any("\ufffd" in piece for piece in found)
    assert sum(map(bool, found)) > len(TEXT)


def test_random_bytes_add_up_to_what_all_of_them_decode_to(byte_level: Tokenizer) -> None:
    draw = random.Random(3)
    for length in [*range(40), 300]:
        ids = [draw.randrange(1, 280) for _ in range(length)]
        assert "".join(pieces(IncrementalDecoder(byte_level), ids)) == byte_level.decode(ids)
    cut = byte_level.encode("🍏")[:2]
    assert "".join(pieces(IncrementalDecoder(byte_level), cut)) == byte_level.decode(cut) == "\ufffd"


def test_a_long_text_is_not_decoded_again_for_every_token(byte_level: Tokenizer) -> None:
    longest = 0

    class Counting:
        def decode(self, ids: list[int]) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return byte_level.decode(ids)

    pieces(IncrementalDecoder(Counting(), byte_level.encode(TEXT)), byte_level.encode(TEXT * 5))
    assert longest < 20
    draw = random.Random(5)
    continuations = [token for token in range(280) if byte_level.decode([token]) == "\ufffd"]
    for length in (50, 400):
        ids = [draw.choice(continuations) for _ in range(length)] + byte_level.encode(TEXT)
        longest = 0
        found = IncrementalDecoder(Counting())
        assert "".join(map(found.push, ids)) == byte_level.decode(ids)
        assert longest < 20


def test_the_space_before_the_first_word_is_that_of_the_whole_text() -> None:
    words = Words()
    assert words.decode([1, 2]) == "b c"
    assert "".join(pieces(IncrementalDecoder(words, [0, 1]), [2, 3])) == " c d"
    assert "".join(pieces(IncrementalDecoder(words), [2, 3])) == "c d"


def test_characters_in_single_bytes_one_after_the_other() -> None:
    """SentencePiece's byte fallback decodes a run of bytes as a whole: one that is incomplete replaces all of it."""
    tokens = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    library = Library(models.BPE(tokens, [], byte_fallback=True, unk_token="<unk>"))
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return str(library.decode(ids))

    decoder = IncrementalDecoder(Bytes())
    assert [piece for byte in TEXT.encode() if (piece := decoder.push(byte + 1))] == list(TEXT)


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("aab", ["ab"], "a"),
        ("xxaby", ["ab", "xab"], "x"),  # both end there: the longer one
        ("xabcab", ["abc", "b"], "xa"),  # the one that ends first
        ("no stop: a", ["ab"], "no stop: a"),
        ("🍏🍐x", ["🍐"], "🍏"),
        ("stop", ["stop"], ""),
    ],
)
def test_text_ends_before_a_stop_string_in_pieces_of_any_length(text: str, stop: list[str], kept: str) -> None:
    for size in range(1, len(text) + 1):
        finder = StopStrings(stop)
        found = [finder.push(text[i : i + size]) for i in range(0, len(text), size)]
        assert "".join([*found, finder.flush()]) == kept
        assert finder.found == (kept != text)
        assert finder.push("more") == "" or not finder.found


def test_a_stop_string_over_the_border_of_tokens(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, byte_level.encode("p"), stop=["苹果"])
    shown = "".join(stream.push(token) for token in byte_level.encode("ein 苹 und 苹果, nichts"))
    assert (shown + stream.end(), stream.stopped) == ("ein 苹 und ", True)
    cut = TextStream(byte_level, stop=["果"])
    shown = "".join(cut.push(token) for token in byte_level.encode("a果")[:-1])
    assert (shown + cut.end(), cut.stopped) == ("a\ufffd", False)
