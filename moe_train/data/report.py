"""What was read of a corpus, and what was left out and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any


class Reason(Enum):
    """Why something was left out or changed: what it is, and what changes that."""

    OWN = "files inside data.dir", "they are of the dataset, not of the corpus"
    OTHER_KIND = "files of other kinds", "name them as one of the kinds that are read"
    NOT_REGULAR = "FIFOs, sockets and devices", "they are never read"
    BROKEN_LINK = "symbolic links to nothing", "correct or remove them"
    LINKED_DIRECTORY = "directories behind symbolic links", "data.follow_links=true reads them"
    SECOND_PATH = "files and directories that were reached by another path already", "they are read once"
    DIRECTORY = "directories that the pattern names", "a pattern such as 'DIRECTORY/**/*.txt' reads what is in them"
    LARGE = "files of the standard library above 300,000 bytes", "they are tables and generated text"
    EMPTY_FILE = "empty files", "there is nothing to read"
    BAD_FILE = "files that cannot be read to the end", "data.bad_records=error stops at the first"
    BAD_RECORD = "records without text or in a wrong encoding", "data.bad_records=error stops at the first"
    NULL = "records whose text is null", "data.null_text=error stops at the first"
    SHORT = "documents without enough text", "data.min_characters sets the limit"
    LONG = "documents with too much text", "data.max_characters sets the limit"
    LANGUAGE = "documents in other languages", "data.languages names those that are kept"
    FILTERED = "documents that data.filter rejects", "data.filter=null keeps them"
    DUPLICATE = "documents that repeat an earlier one", "data.deduplicate=none keeps them"
    NEAR_DUPLICATE = "documents similar to an earlier one", "data.near_duplicates=null keeps them"
    NO_TOKENS = "documents that become no token", "another tokenizer, or data.append_eod=true"
    REPLACED = "documents with characters that no encoding has, replaced by U+FFFD", "correct the text"
    UNDECODED = "files with bytes that are not UTF-8, without these bytes", "they are tests of the standard library"

    @property
    def changed(self) -> bool:
        """Whether the document was kept, in another form."""
        return self in (Reason.REPLACED, Reason.UNDECODED)


@dataclass(frozen=True)
class TextPlace:
    """Where something is in a corpus.

    Attributes:
        file: path of the file.
        unit: what `number` counts: line, row or record; "" for the whole file.
        number: from 1.
        problem: the error there.
    """

    file: str
    unit: str = ""
    number: int = 0
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.number}{self.problem}" if self.unit else f"{self.file}{self.problem}"

    def after(self, count: int) -> TextPlace:
        """The same place where `count` more lines, rows or records are before it."""
        return replace(self, number=self.number + count)


@dataclass
class Report:
    """Counts of reading a corpus once.

    Attributes:
        files: files that were read.
        documents: documents in them.
        kept: documents that the dataset has.
        counts: how often each reason applied.
        first: where it applied first.
    """

    files: int = 0
    documents: int = 0
    kept: int = 0
    counts: dict[Reason, int] = field(default_factory=dict)
    first: dict[Reason, TextPlace] = field(default_factory=dict)

    def add(self, reason: Reason, where: object, count: int = 1) -> None:
        """Count what `reason` applied to, `where` being a file or a `TextPlace`."""
        if count:
            self.counts[reason] = self.counts.get(reason, 0) + count
            if reason not in self.first:
                self.first[reason] = where if isinstance(where, TextPlace) else TextPlace(str(where))

    def include(self, other: Report, before: Mapping[str, int]) -> None:
        """Add the counts of a report on a later part of the corpus.

        Args:
            before: by file, lines of it that are before that part.
        """
        self.files += other.files
        self.documents += other.documents
        self.kept += other.kept
        for reason, count in other.counts.items():
            place = other.first[reason]
            self.add(reason, place.after(before.get(place.file, 0)) if place.unit else place, count)

    def to_record(self) -> dict[str, Any]:
        """For a file that `from_record` reads."""
        reasons = {reason.name: [count, *vars(self.first[reason]).values()] for reason, count in self.counts.items()}
        return {"files": self.files, "documents": self.documents, "kept": self.kept, "reasons": reasons}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Report:
        """The report of which `to_record` made `record`."""
        report = cls(record["files"], record["documents"], record["kept"])
        for name, (count, *place) in record["reasons"].items():
            report.add(Reason[name], TextPlace(*place), count)
        return report

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        counts = {
            reason.name.lower(): {"what": reason.value[0], "count": count, "first": str(self.first[reason])}
            for reason in Reason
            if (count := self.counts.get(reason))
        }
        return {"files": self.files, "documents": self.documents, "kept": self.kept, "left_out_or_changed": counts}


def lines(corpus: dict[str, Any]) -> list[str]:
    """`Report.to_dict` as text: one line of totals, and one for each reason."""
    files = "1 file" if corpus["files"] == 1 else f"{corpus['files']:,} files"
    total = f"{files} with {corpus['documents']:,} documents read, {corpus['kept']:,} kept"
    rows = [total]
    for name, counts in corpus["left_out_or_changed"].items():
        reason = Reason[name.upper()]
        verb = "changed" if reason.changed else "left out"
        rows.append(f"{verb} {counts['count']:>9,} {reason.value[0]} (first: {counts['first']}); {reason.value[1]}")
    return rows
