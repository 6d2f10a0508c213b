"""Hosts with addresses of their own on one machine: network namespaces, joined by a bridge."""

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000
INTERFACE = "eth0"
NAMESPACES = Path("/run/netns")


def enter(namespace: str, host: str) -> None:
    """Move this process to a host: its network, and its name."""
    library = ctypes.CDLL(None, use_errno=True)
    with (NAMESPACES / namespace).open() as file:
        for code in (library.setns(file.fileno(), CLONE_NEWNET), library.unshare(CLONE_NEWUTS)):
            if code:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    socket.sethostname(host)


class Hosts:
    """Hosts ``host0``, ``host1``, … on a switch; each can be cut off and slowed.

    Attributes:
        names: Name of each host.
        addresses: Address of each host.
        namespaces: Network namespace of each host.
    """

    def __init__(self, count: int) -> None:
        self.names = [f"host{number}" for number in range(count)]
        self.addresses = [f"10.77.0.{number + 1}" for number in range(count)]
        self._switch = f"prunekit-{os.getpid()}"
        self.namespaces = [f"{self._switch}-{number}" for number in range(count)]

    def create(self) -> None:
        """Create the namespaces and connect them.

        Raises:
            OSError: There is no ``ip`` command, or it is not allowed.
        """
        _ip("netns", "add", self._switch)
        self._on_switch("link", "add", "bridge", "type", "bridge", "forward_delay", "0")
        self._on_switch("link", "set", "bridge", "up")
        for number, (name, address) in enumerate(zip(self.namespaces, self.addresses, strict=True)):
            _ip("netns", "add", name)
            peer = ("peer", "name", INTERFACE, "netns", name)
            self._on_switch("link", "add", f"port{number}", "type", "veth", *peer)
            self._on_switch("link", "set", f"port{number}", "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for device in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", device, "up")

    def delete(self) -> None:
        """Remove the namespaces, as far as they exist."""
        for name in (*self.namespaces, self._switch):
            if (NAMESPACES / name).exists():
                _ip("netns", "del", name)

    def command(self, number: int, *arguments: str) -> list[str]:
        """Return a command that runs another one on a host."""
        name = f'hostname {self.names[number]} && exec "$@"'
        entered = ["ip", "netns", "exec", self.namespaces[number]]
        return [*entered, "unshare", "--uts", "sh", "-c", name, "sh", *arguments]

    @contextmanager
    def cut_off(self, number: int) -> Iterator[None]:
        """Take the cable of a host out of the switch: nothing arrives, and nobody is told."""
        self._on_switch("link", "set", f"port{number}", "nomaster")
        try:
            yield
        finally:
            self._on_switch("link", "set", f"port{number}", "master", "bridge")

    @contextmanager
    def down(self, number: int) -> Iterator[None]:
        """Take the network interface of a host down."""
        _ip("-n", self.namespaces[number], "link", "set", INTERFACE, "down")
        try:
            yield
        finally:
            _ip("-n", self.namespaces[number], "link", "set", INTERFACE, "up")

    @contextmanager
    def slowed(self, number: int, rate: str) -> Iterator[None]:
        """Limit the speed at which a host sends."""
        limited = ("qdisc", "add", "dev", INTERFACE, "root", "tbf")
        shape = ("rate", rate, "burst", "4kb", "latency", "400ms")
        _run("tc", "-n", self.namespaces[number], *limited, *shape)
        try:
            yield
        finally:
            _run("tc", "-n", self.namespaces[number], "qdisc", "del", "dev", INTERFACE, "root")

    def _on_switch(self, *arguments: str) -> None:
        _ip("-n", self._switch, *arguments)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
