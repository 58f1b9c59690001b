"""What was read of a corpus, and what was left out and why."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    DUPLICATE = "documents that repeat an earlier one", "data.deduplicate=none keeps them"
    NO_TOKENS = "documents that become no token", "another tokenizer, or data.append_eod=true"
    REPLACED = "documents with characters that no encoding has, replaced by U+FFFD", "correct the text"
    UNDECODED = "files with bytes that are not UTF-8, without these bytes", "they are tests of the standard library"

    @property
    def changed(self) -> bool:
        """Whether the document was kept, in another form."""
        return self in (Reason.REPLACED, Reason.UNDECODED)


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
    first: dict[Reason, str] = field(default_factory=dict)

    def add(self, reason: Reason, where: object, count: int = 1) -> None:
        """Count what `reason` applied to, `where` being a file, or a file and a line."""
        if count:
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.first.setdefault(reason, str(where))

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        counts = {
            reason.name.lower(): {"what": reason.value[0], "count": count, "first": self.first[reason]}
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
