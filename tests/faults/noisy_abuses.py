"""What one tenant with a valid token can do to an edge: twelve abuses, each until it is stopped.

In: address, CA file, token, name of an abuse, seconds; out: a line "begun" when it is under way. Everything is sent below the
client, which would send none of it.
    python -m tests.faults.noisy_abuses ADDRESS CA TOKEN NAME SECONDS
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np

from teacher_wire import PROTOCOL
from teacher_wire.core import tensor_codec
from teacher_wire.core.batch import TokenBatch
from teacher_wire.core.calls import ScoreCall
from teacher_wire.core.signals import SignalSpec
from teacher_wire.core.tensor import Tensor
from teacher_wire.generate import codec as generate_codec
from teacher_wire.generate.messages import GenerateCall, PromptBatch, SamplingSpec
from teacher_wire.score import codec
from teacher_wire.score.signals import spec_of
from teacher_wire.transport.channel import Credentials, call_metadata, open_channel
from teacher_wire.v2 import teacher_pb2 as pb
from tests.faults.noisy_server import VOCAB

WINDOW = 256 << 20
_SERVICE = "/teacher_wire.v2.Teacher/"


@dataclass(frozen=True)
class Target:
    """Whom to abuse, and as whom."""

    address: str
    credentials: Credentials

    @contextlib.asynccontextmanager
    async def channel(self, address: str = "") -> AsyncIterator[grpc.aio.Channel]:
        channel = open_channel(address or self.address, self.credentials)
        try:
            yield channel
        finally:
            await channel.close()

    def score(self, channel: grpc.aio.Channel) -> grpc.aio.StreamStreamCall:
        return channel.stream_stream(_SERVICE + "Score")(metadata=call_metadata(self.credentials))

    def generate(self, channel: grpc.aio.Channel, data: bytes) -> grpc.aio.UnaryStreamCall:
        return channel.unary_stream(_SERVICE + "Generate")(data, metadata=call_metadata(self.credentials))


def begun(_said: list[bool] = []) -> None:  # noqa: B006  (once a process)
    """Says so, once."""
    if not _said:
        _said.append(True)
        print("begun", flush=True)


def opened() -> bytes:
    """The first message of a stream."""
    return pb.ScoreUp(open=pb.Open(protocol=PROTOCOL, window_bytes=WINDOW)).SerializeToString()


def requests(
    spec: SignalSpec, tokens: int, extra: int = 0, *, sequence: int = 4096, first: int | None = None
) -> Callable[[], list[bytes]]:
    """Makes requests of another id and other tokens each, as the messages in which they travel."""
    lengths = [sequence] * (tokens // sequence) + ([tokens % sequence] if tokens % sequence > 1 else [])
    numbers = itertools.count(random.randrange(1 << 39) if first is None else first)

    def make() -> list[bytes]:
        number = next(numbers)
        ids = np.random.default_rng(number).integers(0, VOCAB, sum(lengths)).astype(np.int32)
        cu = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        wanted = np.ones(ids.size, np.bool_)
        wanted[cu[1:] - 1] = False
        extra_NM = np.tile(np.arange(extra, dtype=np.int32), (int(wanted.sum()), 1)) if extra else None
        batch = TokenBatch(ids, cu, wanted, extra_NM)
        request = codec.encode_call(ScoreCall(f"r{number:012}", "", "", spec, batch))
        return [up.SerializeToString() for up in codec.request_messages(request)]

    return make


async def swallow(call: grpc.aio.Call) -> None:
    """Reads, gives back what is read, and ends with the call."""
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
        while (data := await call.read()) is not grpc.aio.EOF:
            down = pb.ScoreDown.FromString(data)
            if down.HasField("chunk"):
                payload = codec.payload_bytes(down.chunk)
                await call.write(pb.ScoreUp(credit=pb.Credit(bytes=payload)).SerializeToString())


async def ask_for_ever(
    target: Target, make: Callable[[], list[bytes]], streams: int, *, read: bool = True, address: str = ""
) -> None:
    """Streams that ask as fast as they are read from."""

    async def one() -> None:
        async with target.channel(address) as channel:
            while True:
                call = target.score(channel)
                reader = asyncio.create_task(swallow(call)) if read else None
                with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                    await call.write(opened())
                    while not call.done():
                        for data in make():
                            await call.write(data)
                            begun()
                if reader is not None:
                    reader.cancel()
                await asyncio.sleep(0.1)

    await asyncio.gather(*(one() for _ in range(streams)))


async def call_for_ever(target: Target, make: Callable[[], bytes], at_once: int) -> None:
    """Calls of Generate, one after another in so many places."""

    async def one(channel: grpc.aio.Channel) -> None:
        while True:
            begun()
            with contextlib.suppress(grpc.RpcError):
                async for _ in target.generate(channel, make()):
                    pass
            await asyncio.sleep(0)

    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(target.channel()) for _ in range(min(20, at_once))]
        await asyncio.gather(*(one(channels[number % len(channels)]) for number in range(at_once)))


def generate_request(spec: SamplingSpec, prompts: int = 1, length: int = 4) -> pb.GenerateRequest:
    """A call of Generate."""
    return generate_codec.encode_generate(GenerateCall("", "", spec, PromptBatch.pack([[1] * length] * prompts)))


async def largest_messages(target: Target) -> None:
    """Score requests of 65,536 tokens with 80 ids per row: 21 MB each."""
    number = random.randrange(1 << 39)
    made = requests(spec_of("top_k", VOCAB, k=1, extra=80), 65_536, 80, first=number)()
    numbers = itertools.count(number + 1)

    def make() -> list[bytes]:
        old, new = f"r{number:012}".encode(), f"r{next(numbers):012}".encode()
        return [data.replace(old, new) for data in made]

    await ask_for_ever(target, make, 6)


async def have_lists(target: Target) -> None:
    """Generate with as many pairs in `have` as a message holds."""
    request = generate_request(SamplingSpec(samples=64, max_new_tokens=1), prompts=1024)
    pairs = np.stack(np.divmod(np.arange(600_000, dtype=np.int32) % 65_000, 64), 1).astype(np.int32)
    request.have.CopyFrom(tensor_codec.encode(Tensor("int32", pairs)))
    few = generate_request(SamplingSpec(samples=64, max_new_tokens=1), prompts=1024)
    few.have.CopyFrom(tensor_codec.encode(Tensor("int32", pairs[:65_000])))
    turns = itertools.cycle([request.SerializeToString(), few.SerializeToString()])
    await call_for_ever(target, lambda: next(turns), 8)


async def never_reading(target: Target) -> None:
    """Large answers asked for on many streams, and none read."""
    await ask_for_ever(target, requests(spec_of("full", VOCAB), 3000), 24, read=False)


async def one_byte_a_second(target: Target) -> None:
    """A relay that passes everything up, and down one byte a second after the first 64 KiB."""
    host, port = target.address.rsplit(":", 1)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.setblocking(False)
            await asyncio.get_running_loop().sock_connect(raw, (host, int(port)))
            from_edge, to_edge = await asyncio.open_connection(sock=raw.dup(), limit=1024)
            up = asyncio.create_task(_pump(reader, to_edge))
            with contextlib.suppress(OSError):
                passed = 0
                while data := await from_edge.read(1024 if passed < 65_536 else 1):
                    passed += len(data)
                    writer.write(data)
                    await writer.drain()
                    if passed >= 65_536:
                        await asyncio.sleep(1)
            up.cancel()

    relay = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"127.0.0.1:{relay.sockets[0].getsockname()[1]}"
    await ask_for_ever(target, requests(spec_of("full", VOCAB), 3000), 12, address=address)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


async def ten_thousand_streams(target: Target) -> None:
    """As many streams as can be had, kept open."""

    async def hold(channel: grpc.aio.Channel) -> None:
        call = target.score(channel)
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await call.write(opened())
            await call.read()

    begun()
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(target.channel()) for _ in range(10)]
        while True:
            await asyncio.gather(*(hold(channels[number % 10]) for number in range(10_000)))


async def cancel_storm(target: Target) -> None:
    """Requests that are taken back at once."""
    small = requests(spec_of("top_k", VOCAB, k=64), 512)
    numbers = itertools.count()
    made = [pb.ScoreUp.FromString(small()[0]) for _ in range(16)]

    def make() -> list[bytes]:
        messages = []
        for up in made:
            up.request.request_id = f"c{next(numbers)}"
            cancel = pb.ScoreUp(cancel=pb.Cancel(request_id=up.request.request_id))
            messages += [up.SerializeToString(), cancel.SerializeToString()]
        return messages

    await ask_for_ever(target, make, 8)


async def huge_k(target: Target) -> None:
    """4,096 ids per row: 60 MB an answer."""
    await ask_for_ever(target, requests(spec_of("top_k", VOCAB, k=4096), 2500), 6)


async def huge_schemas(target: Target) -> None:
    """Schemas as long and as deep as may be, some of them refused at their very end."""
    properties = {f"p{number:05}": {"type": "string", "maxLength": 9} for number in range(1000)}
    good = {"type": "object", "properties": properties, "required": list(properties)[:400]}
    bad = {**good, "type": "nothing"}
    texts = [json.dumps(schema)[:65_000] if schema is bad else json.dumps(schema) for schema in (good, bad)]
    made = []
    for text in texts:
        request = generate_request(SamplingSpec(max_new_tokens=1))
        request.sampling.json_schema = text.encode()
        made.append(request.SerializeToString())
    turns = itertools.cycle(made)
    await call_for_ever(target, lambda: next(turns), 16)


async def largest_full(target: Target) -> None:
    """The largest answers there are, read as fast as they come."""
    await ask_for_ever(target, requests(spec_of("full", VOCAB), 4090), 4)


async def generate_queue(target: Target) -> None:
    """Thousands of calls for a million tokens each."""
    data = generate_request(SamplingSpec(samples=64, max_new_tokens=4000), prompts=4).SerializeToString()
    await call_for_ever(target, lambda: data, 2000)


async def malformed(target: Target) -> None:
    """Bytes that are no messages, on every call there is."""
    rng = random.Random(0)
    begun()

    async def one() -> None:
        async with target.channel() as channel:
            while True:
                data = rng.randbytes(rng.choice([1, 100, 70_000, 4 << 20]))
                with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
                    if rng.random() < 0.5:
                        call = target.score(channel)
                        await call.write(data)
                        await call.read()
                    else:
                        async for _ in target.generate(channel, data):
                            pass

    await asyncio.gather(*(one() for _ in range(16)))


async def connects_without_tls(target: Target) -> None:
    """Connections that say no hello, or another one."""
    host, port = target.address.rsplit(":", 1)
    begun()

    async def one(number: int) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(host, int(port))
                if number % 2:
                    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(4096))
                async with asyncio.timeout(1):
                    await reader.read()
                writer.close()

    await asyncio.gather(*(one(number) for number in range(200)), return_exceptions=True)


ABUSES: dict[str, Callable[[Target], Awaitable[None]]] = {
    abuse.__name__: abuse
    for abuse in (
        largest_messages, have_lists, never_reading, one_byte_a_second, ten_thousand_streams, cancel_storm, huge_k,
        huge_schemas, largest_full, generate_queue, malformed, connects_without_tls,
    )
}  # fmt: skip


async def main(address: str, ca: str, token: str, name: str, seconds: str) -> None:
    """One abuse for so long."""
    target = Target(address, Credentials(ca_file=Path(ca), token=token))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(float(seconds)):
            await ABUSES[name](target)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
    os._exit(0)  # thousands of calls end with the process
