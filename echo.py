#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.8"
# ///
r"""A TCP server that echoes complete lines to many clients at once, on a single thread.

    python3 echo.py         # listens on 127.0.0.1:12321 and [::1]:12321
    nc -C localhost 12321   # in another terminal (macOS: nc -c): type a line

A line ends with CR LF, and comes back byte for byte. A client that stops in mid-line
or stops reading delays no other. An error ends only its client. Memory is bounded.

A selector waits until some sockets have bytes to recv or room to send. Then the client
of each takes one step, which never waits: recv returns the bytes that are there, send
takes as many as fit. That is one turn of the loop. Between turns, a client is two
buffers: the inbox holds the beginning of a line, the outbox the bytes it is owed. While
it is owed bytes, it is not read: its TCP must then stop sending, and no other waits.
(The lesson ends at a comment in the middle of EchoServer. The rest makes it robust.)

    ready     called                               kept           waited for next
    listener  accept() = a client                                 bytes from it
    client    recv() = "hel"                       inbox "hel"    bytes from it
    client    recv() = "lo\r\n", send() = 6 of 7   outbox "\n"    room to send
    client    send() = 1 of 1                                     bytes from it
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import operator
import os
import re
import select
import selectors
import signal
import socket
import sys
import time
from functools import partial
from math import inf
from typing import Any, Sequence

(__version__ := "1.2.0")  # It needs Python 3.8: an older one stops at :=, and shows it.
LOOPBACKS = ("127.0.0.1", "::1")
RECEIVE_SIZE = 1 << 17  # bytes that one read takes at most
BARE_LF = "sent LF alone; lines end with CR LF: use nc -C (macOS: nc -c), or --lf"
log = logging.getLogger("echo")


class Client:
    """One connection, and all that the server remembers of it between two turns.

    Reading: its outbox is empty. The server waits for bytes to recv.
    Owed: its outbox holds bytes. The server waits for room to send, and does not read.
    Ending: the server decided so. It is sent what it is owed, then EOF. From then on,
    what comes from it is thrown away.
    """

    def __init__(self, sock: socket.socket, name: str, now: float) -> None:
        self.sock = sock
        self.name = name  # the client's address, for the log
        self.inbox = bytearray()  # the part of a line that has come so far
        self.outbox = bytearray()  # the bytes owed: the kernel had no room for them
        self.received = self.sent = 0  # bytes
        # Used mostly after the lesson. Times are those of time.monotonic().
        self.last_active = now  # when a byte last moved
        self.end_began, self.end_reason = inf, ""  # set when it is ending
        self.warned = False  # whether the log has said that LF alone ends no line


def take_lines(
    inbox: bytearray, chunk: memoryview, terminator: bytes
) -> tuple[bytes | memoryview, bytearray]:
    r"""Add a chunk to the inbox. Return complete lines, and the rest: the next inbox.

    The lines may be a view of the chunk: use them before the next recv.
    >>> lines, inbox = take_lines(bytearray(b"hel"), memoryview(b"lo\r\nwor"), b"\r\n")
    >>> bytes(lines), inbox
    (b'hello\r\n', bytearray(b'wor'))
    """
    # For speed alone (0.2 us, not 1). CR LF ends with LF: it is right with --lf, too.
    if not inbox and len(chunk) > 1 and chunk[-1] == 10 and chunk[-2] == 13:  # CR LF
        return chunk, inbox
    start = max(len(inbox) - 1, 0)  # The last byte may be a CR that waits for its LF.
    inbox += chunk
    # For speed alone: look for LF first. One byte is found 40 times as fast as two.
    found = inbox.rfind(terminator, start) if inbox.find(b"\n", start) >= 0 else -1
    if found < 0:
        return b"", inbox
    end = found + len(terminator)
    return memoryview(inbox)[:end], inbox[end:]  # Only the rest is copied.


class EchoServer:
    """Listens from the moment it is made. It serves once, in the process that made it.

    `hosts` are addresses or names, or one as a string; port 0 takes a free one. `lf`
    ends lines with LF alone. `max_line` is in bytes, `idle_timeout` in seconds.
    Raises TypeError or ValueError for a wrong argument, OSError where it cannot listen.
    Attributes: `addresses`, `max_clients`, and `wakeup_fd` for signal.set_wakeup_fd().
    """

    def __init__(
        self,
        port: int = 12321,
        hosts: str | Sequence[str] = LOOPBACKS,
        *,
        lf: bool = False,
        max_line: int = 1 << 20,
        max_clients: int = 1000,
        idle_timeout: float = inf,
    ) -> None:
        self._terminator = b"\n" if lf else b"\r\n"
        self._inbox_limit = operator.index(max_line) + len(self._terminator)  # bytes
        self._selector: selectors.BaseSelector = selectors.DefaultSelector()
        # Makes _listeners, _ending, _wake_receiver and others: see after the lesson.
        self._init_limits(hosts, port, max_line, max_clients, idle_timeout)
        # All clients share this buffer: what is in it is used up within one step.
        self._buffer = memoryview(bytearray(RECEIVE_SIZE))
        self._clients: set[Client] = set()
        try:
            self._listeners += listen(port, hosts)
            for watched in (self._wake_receiver, *self._listeners):
                watched.setblocking(False)
                self._selector.register(watched, selectors.EVENT_READ)
            self.addresses = [host_and_port(s.getsockname()) for s in self._listeners]
        except BaseException:
            self._release()
            raise

    def serve_forever(self) -> None:
        """Serve until `shutdown()`; raise OSError if the selector cannot wait."""
        self._is_serving = True
        try:
            while not self._stopping:  # until shutdown() or close() is called
                self._turn(timeout=self._housekeeping())  # It does what is due first.
            if not self._closing:  # It was shutdown(): answer those who have come.
                self._drain()
        finally:
            self._release()

    def _turn(self, timeout: float | None) -> None:
        """Wait until sockets are ready, and let each take one step."""
        self._select_began = time.monotonic()  # for the time limits: see _check()
        ready: list[Any] = self._selector.select(timeout)
        self._now = time.monotonic()
        self._verbose = log.isEnabledFor(logging.DEBUG)
        for key, _ in ready:  # The outbox tells for which event we have waited.
            client = key.data  # None for a listener and for the wake-up socket
            if client:
                self._serve(client)
            elif key.fileobj is self._wake_receiver:
                self._wake_receiver.recv(4096)  # just a wake-up: see shutdown()
            else:
                # One step for each ready client, and as many newcomers as there are
                # ready sockets: neither group can starve the other.
                self._accept(key.fileobj, len(ready))

    def _accept(self, listener: socket.socket, newcomers: int) -> None:
        """Accept newcomers, up to this number, as far as there are places."""
        for _ in range(min(newcomers, self.max_clients - len(self._clients))):
            try:
                sock, address = listener.accept()
                sock.setblocking(False)
                client = Client(sock, endpoint(*host_and_port(address)), self._now)
                self._clients.add(client)
            except BlockingIOError:
                return  # Nobody is waiting any more.
            except ConnectionError:
                continue  # This newcomer has gone. The next one may be there.
            except (OSError, MemoryError) as error:
                self._pause_accepting(error)
                return
            log.info("%s connected", client.name)
            try:
                self._selector.register(sock, selectors.EVENT_READ, client)
            except (OSError, MemoryError) as error:
                self._close(client, explain(error))

    def _serve(self, client: Client) -> None:
        """Let a client take one step. An error ends this client, and no other."""
        try:
            if client.outbox:
                self._flush(client)
            else:
                self._receive(client)
        except BlockingIOError:
            pass  # It was not ready after all: readiness is a hint.
        except (OSError, MemoryError) as error:
            self._close(client, explain(error))

    def _receive(self, client: Client) -> None:
        """Read once, and echo the lines that are complete now."""
        # Read no more than fits into the inbox: if it is full, its line is too long.
        space = self._buffer[: self._inbox_limit - len(client.inbox)]
        count = client.sock.recv_into(space)
        if not count:  # EOF: close or half-close. Nothing is owed while we read.
            where = " in mid-line" if client.inbox else ""
            self._close(client, f"closed by client{where}")
            return
        client.received += count
        client.last_active = self._now
        if client in self._ending:
            return  # What comes after the end is thrown away.
        lines, client.inbox = take_lines(client.inbox, space[:count], self._terminator)
        if lines:
            self._echo(client, lines)
        if client.inbox and not client.warned and client.inbox.find(b"\n", -count) >= 0:
            client.warned = True
            log.warning("%s %s", client.name, BARE_LF)
        if len(client.inbox) == self._inbox_limit:
            self._begin_ending(client, f"line longer than {self._max_line} bytes")

    def _echo(self, client: Client, lines: bytes | memoryview) -> None:
        """Send new lines at once: usually there is room, and it saves a turn.

        The outbox keeps the rest. It was empty, or the lines would not have been read.
        (A chat server: add to others' outboxes, bound them, send in their own steps.)
        """
        try:
            sent = client.sock.send(lines)
        except BlockingIOError:
            sent = 0
        client.sent += sent
        if sent < len(lines):
            client.outbox += lines[sent:]
            self._selector.modify(client.sock, selectors.EVENT_WRITE, client)
        if self._verbose:
            log_lines(client.name, bytes(lines).split(self._terminator)[:-1])

    def _flush(self, client: Client) -> None:
        """Send what is owed, as far as there is room. When all is sent, read again."""
        sent = client.sock.send(client.outbox)
        client.sent += sent
        client.last_active = self._now
        del client.outbox[:sent]
        if not client.outbox:
            self._selector.modify(client.sock, selectors.EVENT_READ, client)
            if client in self._ending:
                self._send_eof(client)

    def _close(self, client: Client, reason: str) -> None:
        """Forget a client. The log says why: the server's own reason, if it has one."""
        self._clients.discard(client)
        self._ending.discard(client)
        self._close_socket(client.sock)
        why = client.end_reason or reason
        tally = f"{client.sent} bytes echoed, {client.received - client.sent} dropped"
        log.info("%s disconnected: %s, %s", client.name, why, tally)

    def _close_socket(self, sock: socket.socket) -> None:
        with contextlib.suppress(KeyError):  # if it is not registered
            self._selector.unregister(sock)
        with contextlib.suppress(OSError):  # if it is not connected
            sock.shutdown(socket.SHUT_RDWR)  # even if a forked child has a copy
        sock.close()

    # ---- This is the end of the lesson. Limits, shortages, and ending well -----------
    PAUSE = 1.0  # seconds without accepting, after an error that may last
    TICK = 0.25  # seconds between two checks of the times
    HANG_UP_TIME = 0.5  # seconds of silence after EOF, in which a client may hang up
    LINGER = 5.0  # seconds that the end of a connection may take

    def _init_limits(self, hosts: Any, port: int, *limits: Any) -> None:
        if not (hosts and 0 <= port <= 65535 and all(limit > 0 for limit in limits)):
            raise ValueError(f"no hosts, or out of range: port {port}, limits {limits}")
        self._max_line, most, self._idle_timeout = limits
        # select() takes 1,024 descriptors, on Windows 512 sockets: 500 are safe.
        is_select = isinstance(self._selector, selectors.SelectSelector)
        self.max_clients = min(operator.index(most), 500 if is_select else most)
        self._listeners: list[socket.socket] = []
        self._ending: set[Client] = set()
        self._accepting: bool | None = True  # whether listeners are watched; None: some
        self._resume_at = -inf  # when a pause of accepting ends
        # When select() has returned, when it was called, when _check() is due:
        self._now = self._select_began = self._next_check = time.monotonic()
        self._is_serving = self._stopping = self._closing = self._verbose = False
        self._wake_receiver, self._wake_sender = socket.socketpair()  # see shutdown()
        self._wake_sender.setblocking(False)
        self.wakeup_fd = self._wake_sender.fileno()

    def _may_accept(self) -> bool:
        return len(self._clients) < self.max_clients and self._now >= self._resume_at

    def _watch_listeners(self) -> None:
        """Start or stop watching them. Unwatched, newcomers wait in a queue."""
        self._accepting = self._may_accept()
        try:
            for listener in self._listeners:
                with contextlib.suppress(KeyError):  # if it is not watched
                    self._selector.unregister(listener)
                if self._accepting:
                    self._selector.register(listener, selectors.EVENT_READ)
        except OSError as error:  # Some are watched now, others are not.
            self._pause_accepting(error)

    def _pause_accepting(self, error: OSError | MemoryError) -> None:
        """Accept nobody for a while: it would fail again, and use a whole core."""
        if self._now >= self._resume_at:  # one warning, even if two listeners fail
            log.warning("cannot accept: %s; retry in %g s", explain(error), self.PAUSE)
        self._accepting, self._resume_at = None, self._now + self.PAUSE

    def _housekeeping(self) -> float | None:
        """Do what is due before a turn. Return how many seconds the turn may wait."""
        if self._select_began >= self._next_check:
            self._next_check = self._select_began + self.TICK
            for client in list(self._clients):
                self._check(client)
        if self._accepting != self._may_accept():
            self._watch_listeners()
        timed = self._ending or self._now < self._resume_at or self._idle_timeout < inf
        return max(self._next_check - time.monotonic(), 0) if timed else None

    def _check(self, client: Client) -> None:
        """End a client that is idle; close one that is ending and has had its time."""
        # Measured up to the last call of select(): what came later may still be unread.
        silence = self._select_began - client.last_active
        if client not in self._ending:
            if silence >= self._idle_timeout:
                self._begin_ending(client, f"idle for {self._idle_timeout:g} s")
            return
        has_all = not client.outbox
        if has_all and sys.platform == "linux":  # On other systems, silence must do.
            with contextlib.suppress(OSError):  # on WSL 1, too
                state = client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
                has_all = state != b"\4"  # TCP_FIN_WAIT1: EOF is not acknowledged yet
        late = self._select_began - client.end_began >= self.LINGER
        if late or (has_all and silence >= self.HANG_UP_TIME):
            self._close(client, client.end_reason)

    def _begin_ending(self, client: Client, reason: str) -> None:
        """End a connection from our side: what is owed, then EOF, then time to hang up.

        Meanwhile, what comes is thrown away: if it stayed unread, close() would send a
        reset, which destroys what is on its way to the client (RFC 1122, 4.2.2.13).
        """
        self._ending.add(client)
        client.end_began, client.end_reason = self._now, reason
        client.inbox.clear()  # A full one would leave no room to read.
        if not client.outbox:
            self._send_eof(client)

    def _send_eof(self, client: Client) -> None:
        client.last_active = self._now
        with contextlib.suppress(OSError):  # if it has gone: the next read says so
            client.sock.shutdown(socket.SHUT_WR)

    def _drain(self) -> None:
        """Answer all clients that have come so far, then end their connections."""
        self._turn(timeout=0)  # Those who have left make places for others.
        while self._listeners:
            self._accept(self._listeners[-1], self.max_clients)
            self._close_socket(self._listeners.pop())
        self._turn(timeout=0)  # One more step for each: what they have sent is there.
        for client in self._clients - self._ending:
            self._begin_ending(client, "server stopping")
        if self._clients:
            left = f"clients left: {len(self._clients)}, for {self.LINGER:g} s at most"
            log.info("stopping: %s; a second signal ends it at once, or close()", left)
        timeout = self._housekeeping()
        while self._clients and not self._closing:
            self._turn(timeout)
            timeout = self._housekeeping()  # If it closes the last client, do not wait.

    def shutdown(self) -> None:
        """Make `serve_forever()` return. Any thread or signal handler may call it."""
        self._stopping = True
        with contextlib.suppress(OSError):  # if it is full of wake-ups, or closed
            self._wake_sender.send(b"\0")

    def close(self) -> None:
        """Close everything at once; if `serve_forever()` runs, make it do so."""
        self._closing = True
        self.shutdown()
        if not self._is_serving:
            self._release()

    def _release(self) -> None:
        """Close everything. It may be called twice, and goes on after a failure."""
        self._closing = True
        with contextlib.ExitStack() as stack:  # It makes all calls, even if one fails.
            for resource in (self._wake_sender, self._wake_receiver, self._selector):
                stack.callback(resource.close)
            while self._listeners:
                stack.callback(self._close_socket, self._listeners.pop())
            for client in self._clients:
                stack.callback(self._close, client, "server closed")

    def __enter__(self) -> EchoServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# ---- Addresses -----------------------------------------------------------------------
HOST = r"[\w:%-]{1,63}(\.[\w:%-]{1,63})*\.?"  # getaddrinfo("*") is the loopback!
NO_IPV6 = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)
OPTIONS = (  # Accepted sockets inherit them. Not every system knows them all.
    (socket.SOL_SOCKET, "SO_OOBINLINE", 1),  # an urgent byte is a byte like any other
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),  # short lines go out at once
    (socket.IPPROTO_TCP, "TCP_NOTSENT_LOWAT", 1 << 17),  # full when so many are unsent
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),  # ask silent clients if they are there
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 200),  # seconds; some clouds forget after 240
    (socket.IPPROTO_TCP, "TCP_KEEPALIVE", 200),  # the same, on macOS
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 75),  # seconds until the next question
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),  # questions before a client counts as gone
)


def host_and_port(address: Any) -> tuple[str, int]:
    """Return both; the host keeps its scope, as in fe80::1%eth0."""
    if not address:
        return "?", 0  # macOS: the newcomer has gone, and its address with it.
    numeric = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV  # Nothing is looked up.
    host, port = socket.getnameinfo(address, numeric)
    return host, int(port)


def endpoint(host: str, port: int) -> str:
    """Return an address as people write it: 127.0.0.1:12321 or [::1]:12321."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def look_up(hosts: str | Sequence[str], port: int) -> dict[tuple[int, Any], bool]:
    """Map each (family, address) of the hosts to whether it may be missing."""
    pairs: dict[tuple[int, Any], bool] = {}
    for host in [hosts] if isinstance(hosts, str) else hosts:
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        # An IPv6 address has two colons or more. A single one stands before a port.
        if not re.fullmatch(HOST, bare) or bare.count(":") == 1:
            raise ValueError(f"{host!r} is no host name or IP address (give no port)")
        try:
            found = socket.getaddrinfo(bare, port, type=socket.SOCK_STREAM)
        except OSError as error:
            text = f"cannot listen on {endpoint(bare, port)}: {explain(error)}"
            raise OSError(error.errno, text) from None
        # Where there is no IPv6, IPv4 is enough by default, and for a name with both.
        either = hosts is LOOPBACKS or any(f == socket.AF_INET for f, *_ in found)
        for pair in [(family, address) for family, *_, address in found]:
            is_optional = either and pair[0] == socket.AF_INET6
            pairs[pair] = is_optional and pairs.get(pair, True)
    return pairs


def listen(port: int, hosts: str | Sequence[str]) -> list[socket.socket]:
    """Listen on all addresses of all hosts, on one port. Raises ValueError, OSError."""
    pairs = look_up(hosts, port)
    for _ in range(0 if port else 9):
        with contextlib.suppress(OSError):  # if a free port of one is taken on another
            return open_listeners(port, pairs)
    return open_listeners(port, pairs)


def open_listeners(port: int, pairs: dict[Any, bool]) -> list[socket.socket]:
    """Listen on the addresses that look_up() has returned."""
    listeners: list[socket.socket] = []
    with contextlib.ExitStack() as opened:  # After a failure, it closes them.
        for (family, (host, _, *scope)), is_optional in pairs.items():
            address = (host, port, *scope)
            try:
                listener = socket.create_server(address, family=family, backlog=4096)
            except OSError as error:
                if is_optional and error.errno in NO_IPV6:
                    continue
                # create_server() puts its own words around the error of bind().
                bare = (error.__suppress_context__ and error.__context__) or error
                text = f"cannot listen on {endpoint(host, port)}: {explain(bare)}"
                if error.errno == errno.EINVAL and host.startswith("fe80:"):
                    text += " (it needs its interface, as in fe80::1%eth0)"
                raise OSError(error.errno, text) from None
            listeners.append(opened.enter_context(listener))
            port = listener.getsockname()[1]  # if it was 0
            for level, name, value in OPTIONS:
                with contextlib.suppress(AttributeError, OSError):  # if unknown here
                    listener.setsockopt(level, getattr(socket, name), value)
        opened.pop_all()
    return listeners


# ---- The log -------------------------------------------------------------------------
SHOWN = 80  # at most this many lines of a read are logged, and bytes of a line


def explain(error: BaseException) -> str:
    """Return the reason alone: Connection reset by peer, without [Errno 104]."""
    return getattr(error, "strerror", None) or str(error) or "out of memory"


def log_lines(name: str, lines: list[bytes]) -> None:
    """Log the first lines of a read, each escaped and cut short."""
    for line in lines[:SHOWN]:
        log.debug("%s %r%s", name, line[:SHOWN], "..." if len(line) > SHOWN else "")
    if len(lines) > SHOWN:
        log.debug("%s and more lines: %d", name, len(lines) - SHOWN)


class LogHandler(logging.Handler):
    """Writes to stdout. Drops a line for which there is no room at once."""

    def __init__(self, undo: contextlib.ExitStack) -> None:
        super().__init__()
        self._separator = b""  # a newline, after a line that was cut
        self._stdout = -1  # stays so where there is no descriptor: IDLE, a notebook
        # Ctrl-S stops a terminal. Open it anew: O_NONBLOCK on ours would hit its shell.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            self._stdout = sys.stdout.fileno()
            if sys.platform != "win32":
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
                self._stdout = os.open(os.ttyname(self._stdout), flags)
                undo.callback(os.close, self._stdout)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line of ASCII, if it can be written."""
        line = self.format(record).encode("ascii", "backslashreplace") + b"\n"
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if self._stdout < 0:
                sys.stdout.write(line.decode())
            # POSIX: a pipe with room takes 512 bytes: a whole line. Windows may block.
            elif sys.platform == "win32" or select.select([], [self._stdout], [], 0)[1]:
                line = self._separator + line
                written = os.write(self._stdout, line)
                self._separator = b"" if line[:written].endswith(b"\n") else b"\n"


# ---- The command line ----------------------------------------------------------------
SIGNALS = [n for n in signal.Signals if n.name in ("SIGINT", "SIGTERM", "SIGBREAK")]


def number(kind: type, above: float, most: float, name: str, text: str) -> Any:
    """Convert a text for argparse; above < number <= most."""
    with contextlib.suppress(ValueError):
        if above < kind(text) <= most:
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not {name}")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser. What is not given is left out: EchoServer has the defaults."""
    port = partial(number, int, -1, 65535, "a port (0 to 65535); -b takes an address")
    count = partial(number, int, 0, inf, "a whole number above 0")
    seconds = partial(number, float, 0, inf, "a number above 0")
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.description = "Echo lines to TCP clients. A line ends with CR LF."
    parser.epilog = "a client, for example: nc -C localhost 12321 (macOS: nc -c)"
    add = parser.add_argument
    text = "port to listen on (default: 12321); 0 picks a free one, shown in the log"
    add("port", nargs="?", type=port, default=12321, help=text)
    add("--version", action="version", version=f"echo.py {__version__}")
    text = "name or address to listen on; may be repeated; 0.0.0.0 is all of IPv4, "
    text += ":: all of IPv6 (default: 127.0.0.1 and ::1: from this machine only)"
    add("-b", "--bind", action="append", dest="hosts", metavar="ADDRESS", help=text)
    add("--lf", action="store_true", help="end lines with LF alone (default: CR LF)")
    text = "longest line, not counting its end; a longer one ends the connection "
    add("--max-line", type=count, metavar="BYTES", help=text + "(default: 1048576)")
    text = "clients served at the same time; the others wait (default: 1000)"
    add("--max-clients", type=count, metavar="N", help=text)
    text = "end a connection after this time without a byte in or out (default: never)"
    add("--idle-timeout", type=seconds, metavar="SECONDS", help=text)
    add = parser.add_mutually_exclusive_group().add_argument
    add("-q", "--quiet", action="store_true", help="log where it listens, and warnings")
    add("-v", "--verbose", action="store_true", help="log echoed lines too, cut short")
    return parser


def stop_on_signals(server: EchoServer, undo: contextlib.ExitStack) -> None:
    """Let signals stop the server until `undo` is closed. SIGBREAK is Windows' own."""
    ignore_until = 0.0

    def _on_signal(*_: object) -> None:
        nonlocal ignore_until
        now = time.monotonic()
        if now >= ignore_until:  # else perhaps the same one, sent on by a wrapper
            stop = server.close if ignore_until else server.shutdown
            ignore_until = now + 1
            signal.set_wakeup_fd(-1)  # Its socket closes soon. TICK is enough now.
            stop()

    for signum in SIGNALS:
        undo.callback(signal.signal, signum, signal.signal(signum, _on_signal))
    old = signal.set_wakeup_fd(server.wakeup_fd, warn_on_full_buffer=False)
    undo.callback(signal.set_wakeup_fd, old)
    if __name__ == "__main__" and sys.platform != "win32":
        # Done first of all: a signal while Python exits would show a traceback.
        undo.callback(signal.pthread_sigmask, signal.SIG_BLOCK, SIGNALS)


def raise_descriptor_limit(clients: int) -> None:
    """Let this process have the descriptors that so many clients need, or warn."""
    if sys.platform == "win32":
        return  # It has no such limit.
    import resource

    needed = clients + 32  # for listeners, the selector, and what was inherited
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS has one more limit.
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(needed, hard)), hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        hint = "raise the limit (ulimit -n), or lower --max-clients"
        log.warning("only %d descriptors for %d clients: %s", soft, clients, hint)


def main() -> None:
    """Serve as the command line says, until a signal comes."""
    parser = make_parser()
    options = vars(parser.parse_args())
    quiet, verbose = options.pop("quiet", False), options.pop("verbose", False)
    try:
        server = EchoServer(**options)
    except ValueError as error:
        parser.error(f"argument -b/--bind: {error}")
    except OSError as error:
        sys.exit(f"{parser.prog}: {explain(error)}")
    with server, contextlib.ExitStack() as undo:
        stop_on_signals(server, undo)
        handler = LogHandler(undo)
        undo.callback(log.setLevel, log.level)
        undo.callback(log.removeHandler, handler)
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        for address in server.addresses:
            log.info("listening on %s", endpoint(*address))
        raise_descriptor_limit(server.max_clients)
        if quiet or verbose:
            log.setLevel(logging.WARNING if quiet else logging.DEBUG)
        try:
            server.serve_forever()
        except OSError as error:
            sys.exit(f"{parser.prog}: cannot wait for clients: {explain(error)}")


if __name__ == "__main__":
    for stop_signal in SIGNALS:  # Until the server listens, they just end the process.
        signal.signal(stop_signal, signal.SIG_DFL)
    main()
