"""Which port and which network interface of this machine the ranks of a learner meet by."""

from __future__ import annotations

import socket
import struct
import sys

_ADDRESS_OF_INTERFACE = 0x8915
"""SIOCGIFADDR of Linux."""


def free_port(address: str) -> int:
    with socket.create_server((address, 0)) as server:
        return server.getsockname()[1]


def interface_of(address: str) -> str:
    """The interface that has this IPv4 address; empty if the system does not tell.

    Without it, gloo takes the address that the name of the machine resolves to, which other machines may not
    reach.
    """
    if sys.platform != "linux":
        return ""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asking, _ADDRESS_OF_INTERFACE, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""
