"""What a store of labels has done and holds, in sequences and bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StoreStats:
    """What one store object has done since it was made, in sequences and bytes of files.

    Attributes:
        hits, misses: of `get`.
        written: kept by us; `overtaken`: another process had kept them first, and its bytes were taken.
        damaged: found damaged and deleted; each that `get` finds is a miss too.
        undeletable: of those that are damaged, still there: another user's, or on a disk that is only read.
        unreadable: passed over since the disk refused to read them; `trouble` says of the first which and why.
        evicted: deleted for the budget.
        unwritten: not kept, since the disk refused or the budget is smaller than the blob.
    """

    hits: int = 0
    misses: int = 0
    written: int = 0
    overtaken: int = 0
    damaged: int = 0
    undeletable: int = 0
    unreadable: int = 0
    evicted: int = 0
    unwritten: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    evicted_bytes: int = 0
    trouble: str = ""


@dataclass(frozen=True)
class Amount:
    """Some sequences and the bytes of their files."""

    sequences: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Shelf:
    """All labels of one teacher by one signal, or several together; `newest_use_s` is seconds since 1970."""

    fingerprint: str
    transport: str
    sequences: int
    tokens: int
    rows: int
    bytes: int
    newest_use_s: float
