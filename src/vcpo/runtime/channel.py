"""A channel between two processes of one machine: frames of a JSON header and a body of bytes.

A frame is ``header length (4 bytes) · body length (8 bytes) · header · body``, big endian. Nothing is
pickled. The channel is one end of a Unix socket pair, inherited by the child: nobody else can connect.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

_LENGTHS = struct.Struct(">IQ")

Frame = tuple[dict[str, Any], bytes]


class ChannelClosed(Exception):
    """The other end is gone."""


class Channel:
    """One end, for an event loop. Frames are sent in the order of the calls."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @staticmethod
    async def over(end: socket.socket) -> Channel:
        return Channel(*await asyncio.open_connection(sock=end))

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        """Queue a frame; never waits."""
        encoded = json.dumps(header).encode()
        self._writer.write(_LENGTHS.pack(len(encoded), len(body)) + encoded)
        if body:
            self._writer.write(body)

    async def flush(self) -> None:
        """Wait until what was sent is mostly on its way (back-pressure for large bodies)."""
        try:
            await self._writer.drain()
        except ConnectionError as error:
            raise ChannelClosed from error

    async def receive(self) -> Frame:
        try:
            header_length, body_length = _LENGTHS.unpack(await self._reader.readexactly(_LENGTHS.size))
            header = json.loads(await self._reader.readexactly(header_length))
            return header, await self._reader.readexactly(body_length) if body_length else b""
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise ChannelClosed from error

    def close(self) -> None:
        self._writer.close()


class BlockingChannel:
    """One end, for a process that does one thing at a time."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._file = end.makefile("rb")

    def send(self, header: dict[str, Any], body: bytes = b"") -> None:
        encoded = json.dumps(header).encode()
        try:
            self._socket.sendall(_LENGTHS.pack(len(encoded), len(body)) + encoded + body)
        except OSError as error:
            raise ChannelClosed from error

    def receive(self) -> Frame:
        header_length, body_length = _LENGTHS.unpack(self._exactly(_LENGTHS.size))
        return json.loads(self._exactly(header_length)), self._exactly(body_length)

    def _exactly(self, count: int) -> bytes:
        data = self._file.read(count) if count else b""
        if len(data) < count:
            raise ChannelClosed
        return data


def join_records(records: list[bytes]) -> tuple[list[int], bytes]:
    """Several records as one body, with their lengths."""
    return [len(r) for r in records], b"".join(records)


def split_records(lengths: list[int], body: bytes) -> list[bytes]:
    """Inverse of :func:`join_records`."""
    records, begin = [], 0
    for length in lengths:
        records.append(body[begin : begin + length])
        begin += length
    return records
