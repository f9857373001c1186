#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A TCP server that echoes complete lines to many clients at once, on a single thread.

    python3 echo.py            # listens on 127.0.0.1:12321 and [::1]:12321
    nc -C localhost 12321      # in another terminal (macOS: nc -c): type a line, get it back

A line ends with CR LF. It comes back byte for byte as soon as it is complete, and never before. No
client delays another: not one that sends half a line, not one that stops reading. Memory per
client is bounded, and an error on a connection ends that connection alone.

How it works: a selector tells which sockets are ready, that is, need not be waited for, and one
loop gives each a short turn. Between turns, a client is two buffers: the inbox holds the part of a
line that has come so far, the outbox the bytes that are owed. While bytes are owed, the loop waits
to write to that client and reads nothing from it, so that TCP makes it wait, and it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import select
import selectors
import signal
import socket
import sys
import time
from selectors import EVENT_READ, EVENT_WRITE
from typing import Any, Sequence

__version__ = "1.0.0"
PORT = 12321
LOOPBACKS = ("127.0.0.1", "::1")
MAX_LINE = 1 << 20  # bytes; longer than any line sent on purpose
MAX_CLIENTS = 1000  # stays below 1,024 descriptors, the usual limit of a process on Linux
MAX_CLIENTS_OF_SELECT = 500  # select() fails past 1,024 descriptors, on Windows past 512 sockets
BACKLOG = 4096  # connections that the kernel may queue until accepted; it has a limit of its own
RECEIVE_SIZE = 1 << 17  # bytes per read at most; twice that nearly halves the speed of long lines
TICK = 0.25  # seconds between two looks at the deadlines
REST = 1.0  # seconds to stop accepting when descriptors or kernel memory have run out
LINGER = 5.0  # seconds that a clean end may take
SHOWN = 80  # lines of a read, and bytes of a line, that -v logs
log = logging.getLogger("echo")


def endpoint(address: Sequence[Any]) -> str:
    """Return a socket address as people write it: 127.0.0.1:12321 or [::1]:12321."""
    return f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


class Client:
    """One connection: what has come from it and what is owed to it. It does no I/O."""

    def __init__(self, sock: socket.socket, name: str, deadline: float) -> None:
        self.sock = sock
        self.name = name  # its address, for the log
        self.deadline = deadline  # when to close it, in seconds of time.monotonic()
        self.inbox = bytearray()  # the part of a line that has come so far
        self.outbox = bytearray()  # what the kernel had no room for yet of complete lines
        self.ending = ""  # why the server ends it; from then on its input is thrown away
        self.hinted = False  # whether the log has said that LF alone ends no line
        self.received = self.sent = 0  # bytes

    def feed(self, chunk: memoryview, terminator: bytes, max_line: int) -> memoryview:
        """Return the lines that are complete now, keep the rest; too long a line sets `ending`."""
        inbox = self.inbox
        start = max(len(inbox) - 1, 0)  # what is before has been searched; a CR may end there
        inbox += chunk
        end = 0  # of the last complete line
        reach = max_line + len(terminator)  # how far to jump at once: over no line that is too long
        has_lf = inbox.find(b"\n", start) >= 0  # for speed alone: one byte is found 30 times faster
        while has_lf and (found := inbox.rfind(terminator, start, end + reach)) >= 0:
            start = end = found + len(terminator)
        if end:
            self.inbox = inbox[end:]
        half = self.inbox[-1:] == terminator[:-1]  # a CR at the end may be half a CR LF
        if len(self.inbox) - half > max_line:
            self.ending = f"line longer than {max_line} bytes"
        elif has_lf and not self.hinted and b"\n" in self.inbox:
            self.hinted = True
            log.info("%s sent LF without CR, which ends no line: try nc -C (macOS: nc -c), or --lf",
                     self.name)  # fmt: skip
        return memoryview(inbox)[:end] if end else chunk[:0]  # no view of what grows: BufferError


class EchoServer:
    """Listens from the moment it is made; `addresses` lists each listener's (host, port).

    With `lf`, lines end with LF alone. A line over `max_line` bytes, terminator not counted, ends
    its connection. Over `max_clients`, the kernel queues who comes. `idle_timeout` is in seconds
    without a byte. Raises ValueError for a number out of range, OSError for an unusable address."""

    def __init__(self, port: int = PORT, hosts: Sequence[str] = LOOPBACKS, *, lf: bool = False,
                 max_line: int = MAX_LINE, max_clients: int = MAX_CLIENTS,
                 idle_timeout: float = float("inf")) -> None:  # fmt: skip
        if not (0 <= port <= 65535 and max_line > 0 and max_clients > 0 and idle_timeout > 0):
            raise ValueError("the port must be 0 to 65535, every other number above 0")
        self._terminator = b"\n" if lf else b"\r\n"
        self._max_line = max_line
        self._idle_timeout = idle_timeout
        self._clients: set[Client] = set()
        self._listeners = listen(port, hosts)
        self.addresses: list[tuple[str, int]] = [s.getsockname()[:2] for s in self._listeners]
        self._selector = selectors.DefaultSelector()
        by_select = isinstance(self._selector, selectors.SelectSelector)
        self._max_clients = min(max_clients, MAX_CLIENTS_OF_SELECT) if by_select else max_clients
        self._buffer = bytearray(RECEIVE_SIZE)  # one for all, used up in each turn
        self._view = memoryview(self._buffer)
        self._now = self._deadline = self._rest_until = self._next_check = 0.0
        self.stopping = self._verbose = self._watching = False  # watching: listeners are registered
        self._wake_receiver, self._wake_sender = socket.socketpair()  # see shutdown()
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, EVENT_READ, (self._wake_receiver.recv, 4096))

    def __enter__(self) -> EchoServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def serve_forever(self) -> None:
        """Serve until `shutdown()`; then send what is owed, for LINGER seconds at most; close."""
        while not self.stopping:
            self._run_once(TICK)
        self._run_once(0)  # echo what has just come, one read of it
        for listener in self._listeners:
            listener.close()  # from now on, connections are refused
        for client in self._clients:
            client.ending = client.ending or "server stopping"
            if not client.outbox:
                self._linger(client)
                client.deadline = self._now + TICK  # a read of unread input extends it: see _linger
        deadline = time.monotonic() + LINGER
        while self._clients and (left := deadline - time.monotonic()) > 0:
            self._run_once(min(left, TICK))
        self.close()

    def shutdown(self) -> None:
        """Make `serve_forever()` return. Any thread or signal handler may call it, and again."""
        self.stopping = True
        with contextlib.suppress(OSError):  # full of wake-ups already, or closed
            self._wake_sender.send(b"\0")  # ends select: a signal by itself does not (PEP 475)

    def close(self) -> None:
        """Close everything at once. Calling it again does no harm."""
        for client in list(self._clients):
            self._close(client, "server closed")
        for sock in (*self._listeners, self._wake_receiver, self._wake_sender):
            sock.close()
        self._selector.close()

    def _run_once(self, timeout: float) -> None:
        """Wait until sockets are ready, at most `timeout` seconds, and give each its turn."""
        self._watch_listeners()
        ready = self._selector.select(timeout)
        self._now = time.monotonic()
        self._deadline = self._now + self._idle_timeout  # of who moves a byte in this turn
        self._verbose = log.isEnabledFor(logging.DEBUG)  # once a turn, for speed: 2 % a short line
        for key, _ in ready:  # the mask tells nothing new: each waits for one event only
            handle, client = key.data  # or what else it handles: a listener, a number of bytes
            try:
                handle(client)
            except BlockingIOError:
                pass  # nothing to read, or no room, after all: readiness is only a hint
            except (OSError, EOFError, MemoryError) as reason:
                self._close(client, reason)
        if self._now >= self._next_check:
            self._next_check = self._now + TICK
            for client in [client for client in self._clients if client.deadline <= self._now]:
                self._close(client, f"idle for {self._idle_timeout:g} s")

    def _watch_listeners(self) -> bool:
        """Watch them while there is room; else the kernel queues who comes. Return which it is."""
        room = len(self._clients) < self._max_clients
        accepting = room and not self.stopping and time.monotonic() >= self._rest_until
        if accepting != self._watching:
            self._watching = accepting
            for listener in self._listeners:
                if accepting:
                    self._selector.register(listener, EVENT_READ, (self._accept, listener))
                else:
                    self._selector.unregister(listener)
        return accepting

    def _accept(self, listener: socket.socket) -> None:
        if not self._watch_listeners():
            return  # another listener, earlier in this turn, has taken the last place or failed
        try:
            sock, address = listener.accept()
        except (BlockingIOError, ConnectionError):
            return  # the client has hung up already
        except (OSError, MemoryError) as error:  # EMFILE, ...: it would be ready again at once
            self._rest_until = time.monotonic() + REST
            log.warning("cannot accept: %s; next try in %g s", str(error) or "out of memory", REST)
            return
        client = Client(sock, endpoint(address or ("?", 0)), self._deadline)  # macOS: none if gone
        self._clients.add(client)
        log.info("%s connected", client.name)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # do not delay short lines
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # find who has vanished
            self._selector.register(sock, EVENT_READ, (self._receive, client))
        except (OSError, MemoryError) as reason:
            self._close(client, reason)

    def _receive(self, client: Client) -> None:
        """Read once, and try at once to send the lines that are complete: mostly it all goes."""
        count = client.sock.recv_into(self._buffer)
        if not count:
            raise EOFError("closed by client")
        client.received += count
        if client.ending:
            self._linger(client)
            return
        client.deadline = self._deadline
        lines = self._view[:count]
        whole = count <= self._max_line and self._buffer.endswith(self._terminator, 0, count)
        if not whole or client.inbox:  # for speed alone, up to 13 %: whole lines need no copy
            lines = client.feed(lines, self._terminator, self._max_line)
            count = len(lines)
        if self._verbose:
            self._show(client, lines)
        try:
            sent = client.sock.send(lines) if count else 0
        except BlockingIOError:
            sent = 0
        client.sent += sent
        if sent < count:  # the rest is owed: read nothing more until it has gone
            client.outbox += lines[sent:]
            self._selector.modify(client.sock, EVENT_WRITE, (self._flush, client))
        elif client.ending:
            self._linger(client)

    def _flush(self, client: Client) -> None:
        """Send once of what is owed; when all of it has gone, wait for input again."""
        sent = client.sock.send(client.outbox)  # maybe a part: as much as the kernel has room for
        client.sent += sent
        client.deadline = self._deadline
        del client.outbox[:sent]
        if not client.outbox:  # no more waiting for room: most sockets have some, always ready
            self._selector.modify(client.sock, EVENT_READ, (self._receive, client))
            if client.ending:
                self._linger(client)

    def _show(self, client: Client, lines: memoryview) -> None:
        *shown, more = bytes(lines).split(self._terminator, SHOWN)
        for line in shown:
            log.debug("%s %r%s", client.name, line[:SHOWN], "..." if line[SHOWN:] else "")
        if more:
            log.debug("%s and more lines: %d", client.name, more.count(self._terminator))

    def _linger(self, client: Client) -> None:
        """Send EOF and read on, to throw away: closing over unread input makes the kernel send a
        reset (RFC 1122, 4.2.2.13), which destroys what is still on its way to the client."""
        latest = self._now + LINGER  # from each read when stopping, else from the first
        client.deadline = latest if self.stopping else min(client.deadline, latest)
        with contextlib.suppress(OSError):  # it is gone already; the next read says so
            client.sock.shutdown(socket.SHUT_WR)

    def _close(self, client: Client, reason: object) -> None:
        with contextlib.suppress(KeyError):  # it was never registered
            self._selector.unregister(client.sock)  # first: close() frees its number for another
        client.sock.close()
        self._clients.discard(client)
        log.info("%s disconnected: %s, %d bytes echoed, %d dropped", client.name,
                 client.ending or str(reason) or "out of memory",  # a MemoryError says nothing
                 client.sent, client.received - client.sent)  # fmt: skip


def listen(port: int, hosts: Sequence[str], tries: int = 10) -> list[socket.socket]:
    """Listen on each host, all on one port; 0 means one that is free on all. Raises OSError."""
    listeners: list[socket.socket] = []
    for host in hosts:
        bound = listeners[0].getsockname()[1] if listeners else port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listeners.append(socket.create_server((host, bound), family=family, backlog=BACKLOG))
        except OSError as error:
            no_ipv6 = host == "::1" and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
            if no_ipv6 and hosts is LOOPBACKS:
                continue  # a machine without IPv6, and nobody asked for it
            for listener in listeners:
                listener.close()
            if error.errno == errno.EADDRINUSE and port == 0 and tries:  # free on one, not on all
                return listen(port, hosts, tries - 1)
            text = f"cannot listen on {endpoint((host, bound))}: {error.strerror}"
            raise OSError(error.errno, text.partition(" (while ")[0]) from None
        listeners[-1].setblocking(False)
    return listeners


class LogHandler(logging.Handler):
    """Writes the log to stdout. Drops a line rather than let its slow reader stop the loop."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write if stdout has room: in a pipe for PIPE_BUF bytes (POSIX: 512), more than a line."""
        line = self.format(record).encode("ascii", "backslashreplace") + b"\n"
        with contextlib.suppress(OSError):  # nobody reads it any more, or the disk is full
            if os.name == "nt" or select.select([], [sys.stdout], [], 0)[1]:  # Windows may wait
                os.write(sys.stdout.fileno(), line)


def main() -> None:
    """Run the command line: serve until SIGINT or SIGTERM; a second signal ends it at once."""
    parser = argparse.ArgumentParser(description="Echo complete lines to many TCP clients at once.")
    add = parser.add_argument
    add("port", nargs="?", type=int, default=PORT, help="0 takes a free one (default: %(default)s)")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    add("-b", "--bind", metavar="ADDRESS", action="append", help="default: both loopbacks")
    add("--lf", action="store_true", help="lines end with LF alone, not with CR LF")
    add("--max-line", metavar="BYTES", type=int, default=MAX_LINE, help="default: %(default)s")
    add("--max-clients", metavar="N", type=int, default=MAX_CLIENTS, help="default: %(default)s")
    add("--idle-timeout", metavar="SECONDS", type=float, default="inf", help="default: never")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("-q", action="store_true", help="log warnings only")
    either.add_argument("-v", action="store_true", help="log each echoed line, too")
    args = parser.parse_args()
    try:
        server = EchoServer(args.port, args.bind or LOOPBACKS, lf=args.lf, max_line=args.max_line,
                            max_clients=args.max_clients, idle_timeout=args.idle_timeout)
    except (ValueError, TypeError) as error:  # TypeError: a name that cannot be encoded
        parser.error(str(error))
    except OSError as error:
        sys.exit(f"{parser.prog}: {error.strerror}")

    def _stop(*_: object) -> None:
        if server.stopping:
            os._exit(0)  # the second signal: what is owed is lost
        server.shutdown()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    with contextlib.suppress(OSError, AttributeError):  # reopen a terminal: its flags are shared
        os.dup2(os.open(os.ttyname(1), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY), 1)
    with server:
        log.addHandler(LogHandler() if sys.stdout else logging.NullHandler())
        log.setLevel(logging.DEBUG if args.v else logging.WARNING if args.q else logging.INFO)
        for address in server.addresses:
            log.log(log.level, "listening on %s", endpoint(address))  # also with -q
        server.serve_forever()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Python's exit would make a late one deadly


if __name__ == "__main__":
    main()
