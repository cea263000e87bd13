"""Frames between two processes: whole, in order, whatever their size; and the end is noticed."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcpo.runtime.channel import BlockingChannel, Channel, ChannelClosed, join_records, split_records

headers = st.dictionaries(
    st.text(max_size=5), st.none() | st.integers() | st.text(max_size=20) | st.floats(allow_nan=False)
)


@settings(max_examples=30, deadline=None)
@given(frames=st.lists(st.tuples(headers, st.binary(max_size=50)), max_size=6))
def test_frames_arrive_as_sent_and_in_order_in_both_directions(
    frames: list[tuple[dict[str, Any], bytes]],
) -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        channel, blocking = await Channel.over(ours), BlockingChannel(theirs)
        for header, body in frames:
            channel.send(header, body)
            blocking.send(header, body)
        await channel.flush()
        assert [await asyncio.to_thread(blocking.receive) for _ in frames] == frames
        assert [await channel.receive() for _ in frames] == frames
        channel.close()
        theirs.close()

    asyncio.run(scenario())


def test_a_body_larger_than_any_buffer() -> None:
    body = bytes(range(256)) * 40_000  # 10 MB

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        channel, blocking = await Channel.over(ours), BlockingChannel(theirs)

        def echo() -> None:
            blocking.send(*blocking.receive())

        thread = threading.Thread(target=echo)
        thread.start()
        channel.send({"n": 1}, body)
        await channel.flush()
        assert await channel.receive() == ({"n": 1}, body)
        thread.join()
        channel.close()
        theirs.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("sent", [b"", b"\0\0", struct.pack(">IQ", 2, 5) + b"{}" + b"abc"])
def test_an_end_in_the_middle_of_a_frame_is_the_end(sent: bytes) -> None:
    """The other process died while it was writing."""
    ours, theirs = socket.socketpair()
    theirs.sendall(sent)
    theirs.close()
    with pytest.raises(ChannelClosed):
        BlockingChannel(ours).receive()
    ours.close()

    async def scenario() -> None:
        ours, theirs = socket.socketpair()
        theirs.sendall(sent)
        theirs.close()
        channel = await Channel.over(ours)
        with pytest.raises(ChannelClosed):
            await channel.receive()
        channel.close()

    asyncio.run(scenario())


def test_sending_to_nobody_is_reported() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(ChannelClosed):
        BlockingChannel(ours).send({}, b"x")
    ours.close()


@given(records=st.lists(st.binary(max_size=20), max_size=8))
def test_records_are_joined_and_split_again(records: list[bytes]) -> None:
    assert split_records(*join_records(records)) == records
