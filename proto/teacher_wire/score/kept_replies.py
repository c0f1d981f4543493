"""Finished replies until the student acknowledges them, bounded in bytes and seconds; what a resumed request goes on with.

In: serialised chunks; out: the same. When there is too much, the tenant that keeps most loses its oldest.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from itertools import islice

from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.signals import TeacherSignals
from teacher_wire.score import codec
from teacher_wire.v2 import teacher_pb2 as pb


@dataclass
class Reply:
    """A finished answer, ready to be sent again.

    Attributes:
        chunks: each as it travels, and its payload bytes.
        done: the message that ends it, as it travels.
    """

    reply_id: int
    chunks: list[tuple[bytes, int]]
    done: bytes
    payload_bytes: int
    tenant: str = ""
    born_s: float = field(default_factory=time.monotonic)


class KeptReplies:
    """Replies by the name of what was asked.

    Args:
        max_bytes: of payload, in all.
        max_age_s: how long one is kept.
    """

    def __init__(self, max_bytes: int, max_age_s: float) -> None:
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._replies: OrderedDict[str, Reply] = OrderedDict()
        self._bytes_of: Counter[str] = Counter()
        self.kept_bytes = 0

    def find(self, key: str) -> Reply | None:
        """The reply of that name, if it is still there."""
        self._expire()
        return self._replies.get(key)

    def keep(self, key: str, reply: Reply) -> None:
        """Keeps a reply from now on."""
        self.forget(key)  # two streams may have computed the same
        self._replies[key] = reply
        self._bytes_of[reply.tenant] += reply.payload_bytes
        self.kept_bytes += reply.payload_bytes
        self._expire()

    def forget(self, key: str) -> None:
        """Drops a reply, if it is there."""
        reply = self._replies.pop(key, None)
        if reply is None:
            return
        self.kept_bytes -= reply.payload_bytes
        self._bytes_of[reply.tenant] -= reply.payload_bytes
        if not self._bytes_of[reply.tenant]:
            del self._bytes_of[reply.tenant]

    def _expire(self) -> None:
        oldest_allowed_s = time.monotonic() - self._max_age_s
        while self._replies:
            key, reply = next(iter(self._replies.items()))
            if reply.born_s >= oldest_allowed_s:
                break
            self.forget(key)
        while self.kept_bytes > self._max_bytes:
            largest = max(self._bytes_of, key=self._bytes_of.__getitem__)
            self.forget(next(key for key, reply in self._replies.items() if reply.tenant == largest))


class ReplyEncoder:
    """An answer on its way to the messages in which it travels, a few at a time: the first are sent while the rest are encoded."""

    def __init__(self, call: ScoreCall, signals: TeacherSignals) -> None:
        self.payload_bytes = signals.payload_bytes
        self._call = call
        self._signals = signals
        self._reply_id = secrets.randbits(63) + 1  # 0 is no reply
        self._chunks: list[tuple[bytes, int]] = []
        self._rest = codec.encode_chunks(call, self._reply_id, signals)

    def encode(self, count: int) -> list[tuple[bytes, int]]:
        """The next chunks as they travel, each with its payload bytes; none once all are encoded."""
        chunks = list(islice(self._rest, count))
        self._chunks += chunks
        return chunks

    def reply(self) -> Reply:
        """The whole answer, once all of it is encoded."""
        call, signals = self._call, self._signals
        done = pb.ScoreDone(
            request_id=call.request_id,
            reply_id=self._reply_id,
            chunks=len(self._chunks),
            rows=call.batch.rows,
            fingerprint=signals.fingerprint,
            timing=codec.encode_timing(signals.timing),
        )
        data = pb.ScoreDown(done=done).SerializeToString()
        return Reply(self._reply_id, self._chunks, data, self.payload_bytes, call.tenant)
