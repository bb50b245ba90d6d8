"""A ZeroMQ pair on the event loop: nothing is lost, nothing waits that could go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import zmq
from zmq.constants import SocketOption

from loramux.front.pipe import Pipe

Peer = zmq.Socket[bytes]


class Ends:
    """A listening pipe, what it received, and sockets to be its peer."""

    def __init__(self, folder: Path) -> None:
        self.context: zmq.Context[Peer] = zmq.Context()
        self.address = f"ipc://{folder}/pipe"
        self.pipe = Pipe(self.context, self.address)
        self.seen: list[bytes] = []
        self.on_message = self.seen.append
        self.listener = asyncio.create_task(self.pipe.listen(lambda m: self.on_message(m)))

    def peer(self) -> Peer:
        socket = self.context.socket(zmq.PAIR)
        socket.set(SocketOption.RCVTIMEO, 10_000)
        socket.set(SocketOption.RCVHWM, 1)
        socket.connect(self.address)
        return socket

    async def receives(self, num: int) -> list[bytes]:
        async with asyncio.timeout(10):
            while len(self.seen) < num:
                await asyncio.sleep(0.001)
        return self.seen


@asynccontextmanager
async def ends(folder: Path) -> AsyncIterator[Ends]:
    it = Ends(folder)
    try:
        yield it
    finally:
        it.listener.cancel()
        with suppress(asyncio.CancelledError, ZeroDivisionError):
            await it.listener
        it.pipe.close()
        it.context.destroy(linger=0)


def numbers(first: int, end: int) -> list[bytes]:
    return [b"%d" % i for i in range(first, end)]


def test_everything_arrives_in_order_and_the_loop_turns_between(tmp_path: Path) -> None:
    async def body() -> None:
        async with ends(tmp_path) as it:
            turns = 0

            async def turn() -> None:
                nonlocal turns
                while True:
                    turns += 1
                    await asyncio.sleep(0)

            at = []
            it.on_message = lambda message: (it.seen.append(message), at.append(turns))  # type: ignore[assignment, func-returns-value]
            peer = it.peer()
            for message in numbers(0, 200):
                peer.send(message)
            turning = asyncio.create_task(turn())
            assert await it.receives(200) == numbers(0, 200)
            turning.cancel()
            assert len(set(at)) == 200, "no turn of the loop took two"

    asyncio.run(body())


def test_both_directions_at_once(tmp_path: Path) -> None:
    """A send may swallow the descriptor's word that something has come; nobody waits for that."""

    async def body() -> None:
        async with ends(tmp_path) as it:
            peer = it.peer()
            for i, message in enumerate(numbers(0, 300)):
                peer.send(message)
                await it.pipe.send(message)
                if i % 3 == 2:
                    await it.receives(i + 1)
            assert await it.receives(300) == numbers(0, 300)
            assert await asyncio.to_thread(lambda: [peer.recv() for _ in range(300)]) == it.seen

    asyncio.run(body())


def test_sends_wait_for_a_peer_and_for_room(tmp_path: Path) -> None:
    async def body() -> None:
        async with ends(tmp_path) as it:
            sent = 0

            async def send() -> None:
                nonlocal sent
                for message in numbers(0, 20_000):
                    await it.pipe.send(message + bytes(500))
                    sent += 1

            sender = asyncio.create_task(send())
            await asyncio.sleep(0.02)
            assert sent == 0, "nobody is there"
            peer = it.peer()
            before = -1
            async with asyncio.timeout(10):
                while sent > before or not sent:  # nobody reads: at some time all is full
                    before = sent
                    await asyncio.sleep(0.05)
            assert 0 < sent < 20_000
            got = await asyncio.to_thread(lambda: [peer.recv()[:-500] for _ in range(20_000)])
            await asyncio.wait_for(sender, 10)
            assert got == numbers(0, 20_000)

    asyncio.run(body())


def test_what_the_receiver_raises_ends_the_listening(tmp_path: Path) -> None:
    async def body() -> None:
        async with ends(tmp_path) as it:

            def fails(message: bytes) -> None:
                it.seen.append(message)
                raise ZeroDivisionError

            it.on_message = fails  # type: ignore[assignment]
            peer = it.peer()
            peer.send(b"1")
            peer.send(b"2")
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(it.listener, 10)
            await asyncio.sleep(0.02)
            assert it.seen == [b"1"]

    asyncio.run(body())


def test_an_address_that_cannot_be_bound(tmp_path: Path) -> None:
    with zmq.Context() as context, pytest.raises(OSError):
        Pipe(context, f"ipc://{tmp_path}/no/such/folder/pipe")
