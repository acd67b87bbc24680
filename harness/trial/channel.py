"""Messages between the judge and the process of the submission: tensors, numbers, texts and containers of them.

Nothing in a message is executed on arrival: it is read with `weights_only=True`.
"""

from __future__ import annotations

import io
import socket
import struct
from typing import Any

import torch

_LENGTH = struct.Struct("<Q")


class ChannelClosed(Exception):
    """The other process has ended."""


class Channel:
    """One end of a connected pair of sockets."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: dict[str, Any]) -> None:
        """Send a message whole. Raises ChannelClosed."""
        buffer = io.BytesIO()
        torch.save(message, buffer)
        try:
            self._connection.sendall(_LENGTH.pack(buffer.getbuffer().nbytes))
            self._connection.sendall(buffer.getbuffer())
        except OSError as error:
            raise ChannelClosed from error

    def receive(self) -> dict[str, Any]:
        """Wait for a message, with all tensors on the CPU. Raises ChannelClosed, and ValueError for what is none."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        content = io.BytesIO(self._read(length))
        try:
            message = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"a message that cannot be read: {error}") from error
        if not isinstance(message, dict):
            raise ValueError(f"a message that is no mapping: {type(message).__name__}")
        return message

    def _read(self, length: int) -> bytearray:
        content = bytearray(length)
        view = memoryview(content)
        while view:
            try:
                count = self._connection.recv_into(view)
            except OSError as error:
                raise ChannelClosed from error
            if not count:
                raise ChannelClosed
            view = view[count:]
        return content

    def close(self) -> None:
        """Close this end; the other one's next message fails."""
        self._connection.close()
