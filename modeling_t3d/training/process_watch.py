# Copyright 2026 The modeling_t3d authors.
# Licensed under the Apache License, Version 2.0; see the LICENSE file.
"""Ends a process whose launcher or whose run is gone: a rank that waits for a dead one would wait for hours."""

import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from .processes import OtherProcessError, ProcessGroup

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0
_CONNECT_SECONDS = 120.0
_TIDY_SECONDS = 20.0
_LEAVE = "leave"
_TOKEN_BYTES = 16
_RANK_BYTES = 4


class ProcessWatch:
    """
    While entered, notices that the launcher, the main process or another process of the run has died.

    Every process keeps a connection to the main one. The operating system closes it when a process dies, whatever
    killed it and however busy the other side is; that of a machine that vanished is found dead by keep-alive probes
    after 25 s. A process that fails says why before it closes; the others then have 20 s to tidy up. A launcher that
    dies leaves its processes to another parent, at which each looks every 2 s.

    Args:
        processes ([`ProcessGroup`]): of the run; one alone is watched for its launcher only.
        on_death (callable): called once, from a thread, with the cause in one line; should end the process.
    """

    def __init__(self, processes: ProcessGroup, on_death: Callable[[str], None]) -> None:
        self.processes = processes
        self.on_death = on_death
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._is_known = threading.Event()
        self._cause: str | None = None
        self._peers: dict[int, socket.socket] = {}

    def __enter__(self) -> "ProcessWatch":
        parent = os.getppid()
        # Launchers wait for what they start; a shell may not.
        if dist.is_torchelastic_launched() or _is_accelerate(parent):
            threading.Thread(target=self._watch_parent, args=(parent,), name="launcher", daemon=True).start()
        if self.processes.size > 1:
            self._connect()
            for rank, peer in self._peers.items():
                threading.Thread(target=self._watch, args=(rank, peer), name=f"rank {rank}", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.announce(_LEAVE):
            # No thread calls it from here on. They may wait for others to leave, and would keep the trainer alive.
            self.on_death = lambda cause: None
        for peer in self._peers.values():
            peer.close()

    def wait_for_cause(self, seconds: float) -> str | None:
        """Why another process or the launcher is gone, as soon as it is known; `None` if it is not by then."""
        self._is_known.wait(seconds)
        return self._cause

    def announce(self, cause: str) -> bool:
        """
        Tell the other processes that this one leaves, and why; what they do from then on ends nothing here.

        Returns whether this was the first cause that this process announced.
        """
        with self._lock:
            if self._left.is_set():
                return False
            self._left.set()
            for peer in self._peers.values():
                with suppress(OSError):
                    peer.sendall(cause.encode())
                    peer.shutdown(socket.SHUT_WR)
        return True

    def _connect(self) -> None:
        """One connection between the main process and each other one."""
        server = _listen() if self.processes.is_main else None
        port = server.getsockname()[1] if server else 0
        token, port = self.processes.from_main((secrets.token_bytes(_TOKEN_BYTES), port))
        with self.processes.together():
            if server is not None:
                with server:
                    server.settimeout(_CONNECT_SECONDS)
                    self._accept(server, token)
            else:
                # Where the process group found the main process, too.
                address = os.environ["MASTER_ADDR"]
                try:
                    peer = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
                except OSError as error:
                    raise OtherProcessError(
                        f"no connection to the main process at {address}:{port} ({error}); let the machines of a run "
                        "reach each other's ports"
                    ) from None
                peer.sendall(token + self.processes.rank.to_bytes(_RANK_BYTES, "big"))
                self._peers[0] = peer
        for peer in self._peers.values():
            peer.settimeout(None)
            _probe(peer)

    def _accept(self, server: socket.socket, token: bytes) -> None:
        while len(self._peers) < self.processes.size - 1:
            peer, _ = server.accept()
            peer.settimeout(_CONNECT_SECONDS)
            greeting = _receive(peer, _TOKEN_BYTES + _RANK_BYTES)
            # Anything on the network may connect; only the run's processes know the token.
            if secrets.compare_digest(greeting[:_TOKEN_BYTES], token):
                self._peers[int.from_bytes(greeting[_TOKEN_BYTES:], "big")] = peer
            else:
                peer.close()

    def _watch(self, rank: int, peer: socket.socket) -> None:
        """Wait until a process leaves, fails or dies."""
        received = b""
        with suppress(OSError):
            while block := peer.recv(4096):
                received += block
        cause = received.decode(errors="replace")
        if cause == _LEAVE or self._left.is_set():
            return
        name = "the main process" if rank == 0 else f"rank {rank}"
        if cause:
            self._cause = f"{name} failed: {cause}"
            self._is_known.set()
            self._left.wait(_TIDY_SECONDS)
        self._die(self._cause or f"{name} died")

    def _watch_parent(self, parent: int) -> None:
        while not self._left.wait(_POLL_SECONDS):
            if os.getppid() != parent:
                self._die("the launcher died")

    def _die(self, cause: str) -> None:
        if self.announce(cause):
            self.on_death(cause)


def _is_accelerate(process: int) -> bool:
    """Whether a process is `accelerate launch`, which starts a single process as a plain child."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    return any(Path(word).name == "accelerate" or word.startswith("accelerate.commands") for word in words)


def _listen() -> socket.socket:
    """A socket that accepts connections at a free port."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _probe(peer: socket.socket) -> None:
    """Find out within 25 s that the other side's machine is gone."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _receive(peer: socket.socket, num_bytes: int) -> bytes:
    """So many bytes, or fewer if the other side closes."""
    received = b""
    with suppress(OSError):
        while len(received) < num_bytes and (block := peer.recv(num_bytes - len(received))):
            received += block
    return received


__all__ = ["ProcessWatch"]
