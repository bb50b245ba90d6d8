"""One end of a ZeroMQ pair on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq
from zmq.constants import PollEvent, SocketOption, SocketType

_HIGH_WATER = 1000
"""Messages that may lie in either direction before the sender waits."""
_POLLIN = int(PollEvent.POLLIN)


class Pipe:
    """A bound PAIR socket for one task that listens and one that sends.

    Not zmq.asyncio, which makes several futures, callbacks and socket queries of each message. The
    socket's descriptor says "something changed" and says it once; then the socket must be asked
    until it has nothing more. Sending may swallow that word, so it is followed by a look.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        """Raises OSError when ``address`` cannot be bound."""
        self._socket = context.socket(SocketType.PAIR)
        self._changed = asyncio.Event()
        self._look: Callable[[], None] | None = None
        try:
            self._socket.set(SocketOption.LINGER, 0)
            self._socket.set_hwm(_HIGH_WATER)
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise OSError(error.errno, str(error)) from error

    async def listen(self, received: Callable[[bytes], None]) -> str:
        """Calls ``received`` with each message, one a turn of the loop; raises what it raises."""
        loop = asyncio.get_running_loop()
        failure: asyncio.Future[str] = loop.create_future()

        def look() -> None:
            if failure.done():
                return
            self._changed.set()
            if not self._readable():
                return
            try:
                received(self._socket.recv())
            except Exception as error:
                failure.set_exception(error)
                return
            if self._readable():
                loop.call_soon(look)

        descriptor = self._socket.fileno()
        loop.add_reader(descriptor, look)
        self._look = look
        look()
        try:
            return await failure
        finally:
            self._look = None
            loop.remove_reader(descriptor)

    async def send(self, message: bytes) -> None:
        """Waits while the peer is not there or has a full queue."""
        while True:
            self._changed.clear()
            try:
                self._socket.send(message, zmq.NOBLOCK)
            except zmq.Again:
                await self._changed.wait()
            else:
                break
        if self._look is not None:
            self._look()

    def _readable(self) -> bool:
        # pyzmq's exception for "nothing there" takes four times as long as the question.
        return int(self._socket.getsockopt(SocketOption.EVENTS)) & _POLLIN != 0

    def close(self) -> None:
        """What was not sent is dropped."""
        self._socket.close()
