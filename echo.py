#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.8"
# ///
"""A TCP server that echoes complete lines to many clients at once, on a single thread.

    python3 echo.py         # listens on 127.0.0.1:12321 and [::1]:12321
    nc -C localhost 12321   # in another terminal (macOS: nc -c): type a line

A line ends with CR LF, and comes back byte for byte. A client that stops in mid-line
or stops reading delays no other. An error ends only its client. Memory is bounded.

A selector waits until some sockets have bytes to recv or room to send. Then the
client of each takes one step without waiting: recv takes what has come, send what there
is room for. That is one turn of the loop. Between turns, a client is two buffers: the
inbox holds the beginning of a line, the outbox the bytes it is owed. While it is owed
bytes, the loop waits to write and does not read: TCP makes this one client wait.
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
from math import inf
from selectors import EVENT_READ, EVENT_WRITE
from typing import Any, Iterable

(NEEDS := "echo.py needs Python 3.8")  # An older Python stops here, and shows this.

__version__ = "1.1.0"
RECEIVE_SIZE = 1 << 17  # bytes that one read takes at most
CR, LF = b"\r\n"  # 13 and 10
log = logging.getLogger("echo")


class Client:
    """One connection, and all that the server remembers of it between two turns."""

    def __init__(self, sock: socket.socket, name: str, now: float) -> None:
        self.sock = sock
        self.name = name  # its address, for the log
        self.inbox = bytearray()  # the part of a line that has come so far
        self.outbox = bytearray()  # what it is owed: bytes the kernel had no room for
        self.last_active = now  # when a byte last moved, in seconds of time.monotonic()
        self.received = self.sent = 0  # bytes
        self.warned = False  # whether the log has explained that LF alone ends no line
        # When the server ends a connection, it sends what is owed, then EOF. What comes
        # after that is thrown away, until the client hangs up or has had its time.
        self.ending = ""  # why the server ends this connection; empty: it does not
        self.ending_since = inf  # in seconds of time.monotonic()


def take_lines(
    inbox: bytearray, chunk: memoryview, terminator: bytes, max_line: int
) -> tuple[bytes | memoryview, bytearray]:
    """Return the lines that the chunk completes, and the remainder: the next inbox.

    A remainder of max_line + len(terminator) bytes or more begins with too long a line.
    """
    # Optimization: the chunk is whole lines (with --lf, too), and none can be too long.
    if not inbox and 1 < len(chunk) <= max_line and chunk[-1] == LF and chunk[-2] == CR:
        return chunk, inbox
    start = max(len(inbox) - 1, 0)  # Search from here: the last byte may be a CR.
    inbox += chunk
    end = 0  # The lines to take end here.
    # Optimization: no LF, no end of a line; and one byte is found much faster than two.
    if inbox.find(b"\n", start) >= 0:
        reach = max_line + len(terminator)  # the longest line, with its terminator
        # The next line starts at `end`. All lines that end within its reach are short.
        while (at := inbox.rfind(terminator, start, end + reach)) >= 0:
            start = end = at + len(terminator)  # Take them all, and look again.
    if not end:
        return b"", inbox
    return memoryview(inbox)[:end], inbox[end:]


class EchoServer:
    """Listens from the moment it is made. It serves once, in the process that made it.

    `hosts` are addresses or names, or one as a string; None means both loopbacks.
    `max_line` is in bytes, `idle_timeout` in seconds; port 0 takes a free one.
    Raises ValueError for an argument out of range, OSError for an unusable address.
    """

    def __init__(
        self,
        port: int = 12321,
        hosts: str | Iterable[str] | None = None,
        *,
        lf: bool = False,
        max_line: int = 1 << 20,
        max_clients: int = 1000,
        idle_timeout: float = inf,
    ) -> None:
        check_range(port, max_line, max_clients, idle_timeout)
        self._terminator = b"\n" if lf else b"\r\n"
        self._max_line = max_line
        self._max_clients = max_clients
        self._idle_timeout = idle_timeout
        self._clients: set[Client] = set()
        self._buffer = memoryview(bytearray(RECEIVE_SIZE))  # used anew for each read
        self._listeners: list[socket.socket] = []
        self._accepting = False  # whether the selector watches the listeners
        self._now = time.monotonic()  # the time of this turn
        self._deadline = 0.0  # of the next _check_deadlines(); inf: none is needed
        self._rest_until = inf  # when a rest after a shortage ends; inf: there is none
        self._stopping = False  # set by shutdown()
        self._closing = False  # set by close()
        self._verbose = False  # whether echoed lines are logged: asked once a turn
        self._selector: selectors.BaseSelector = selectors.DefaultSelector()
        self._wake_receiver, self._wake_sender = socket.socketpair()  # see shutdown()
        self._open(port, hosts)  # sets _listeners, addresses, and _opened: an ExitStack

    def serve_forever(self) -> None:
        """Serve until `shutdown()`; then end every connection, and close everything."""
        with self._opened.pop_all():  # At the end, this closes all; close() only asks.
            while not self._stopping:
                self._watch_listeners()
                self._turn()
            if not self._closing:
                self._stop()

    def _turn(self) -> None:
        """Wait until sockets are ready or a deadline has come; serve who is ready."""
        began = time.monotonic()
        timeout = None if self._deadline == inf else self._deadline - began
        try:
            ready: list[Any] = self._selector.select(timeout)
        except (OSError, MemoryError):
            ready = []
            self._renew_selector()
        self._now = time.monotonic()
        self._verbose = log.isEnabledFor(logging.DEBUG)
        for key, _ in ready:
            if client := key.data:  # None for _wake_receiver and the listeners
                self._serve(client)
            elif key.fileobj is self._wake_receiver:
                with contextlib.suppress(OSError):
                    self._wake_receiver.recv(4096)
            else:  # A listener: no more newcomers than there are sockets ready.
                self._accept(key.fileobj, len(ready))
        self._check_deadlines(began)  # as of `began`: whoever was ready has been served

    def _accept(self, listener: socket.socket, most: int) -> None:
        """Take in up to `most` clients, so that a crowd of newcomers delays nobody."""
        while most and self._can_accept():
            most -= 1
            try:
                sock, address = listener.accept()
                client = Client(sock, endpoint(*host_and_port(address)), self._now)
                self._clients.add(client)
            except BlockingIOError:
                return  # The queue is empty.
            except (OSError, MemoryError) as error:
                # A shortage stops every newcomer; any other error, only this one.
                if isinstance(error, MemoryError) or error.errno in self.SHORTAGES:
                    self._rest(error)
            else:
                log.info("%s connected", client.name)
                self._watch(client)

    def _watch(self, client: Client) -> None:
        """Register a client (again): to write if it is owed bytes, else to read."""
        try:
            client.sock.setblocking(False)
            event = EVENT_WRITE if client.outbox else EVENT_READ
            self._selector.register(client.sock, event, client)
        except (OSError, MemoryError) as error:
            self._close(client, plain(error))

    def _serve(self, client: Client) -> None:
        """Let a ready client make one step. An error ends that client, and it alone."""
        try:
            if client.outbox:
                self._send(client, client.outbox)
            else:
                self._receive(client)
        except BlockingIOError:
            pass  # recv had nothing after all: readiness is a hint.
        except (OSError, MemoryError) as error:
            self._close(client, plain(error))

    def _receive(self, client: Client) -> None:
        """Read once, and send the lines that are now complete."""
        count = client.sock.recv_into(self._buffer)
        if not count:  # EOF: a close or a half-close. We read, so nothing is owed.
            where = " in mid-line" if client.inbox else ""  # Half a line is dropped.
            self._close(client, f"closed by client{where}")
            return
        client.last_active = self._now
        client.received += count
        if client.ending:
            return  # What comes after the end is thrown away.
        lines, client.inbox = take_lines(
            client.inbox, self._buffer[:count], self._terminator, self._max_line
        )
        if lines:
            self._send(client, lines)
            if self._verbose:
                log_lines(client.name, bytes(lines).split(self._terminator)[:-1])
        if client.inbox:
            self._check_inbox(client, count)  # Too long a line ends this client.

    def _send(self, client: Client, data: bytes | bytearray | memoryview) -> None:
        """Send once: new lines, or the outbox. The outbox keeps what did not fit."""
        # New lines are tried at once: mostly there is room, and to wait costs a turn.
        try:
            sent = client.sock.send(data)
            client.last_active = self._now
        except BlockingIOError:
            sent = 0
        client.sent += sent
        if data is client.outbox:
            del client.outbox[:sent]
            if not client.outbox:  # Nothing is owed: wait to read.
                self._selector.modify(client.sock, EVENT_READ, client)
                if client.ending:  # All is sent: now _end() sends EOF.
                    self._end(client, client.ending)
        elif sent < len(data):  # The rest is owed from now on: wait to write.
            client.outbox += data[sent:]
            self._selector.modify(client.sock, EVENT_WRITE, client)

    def _close(self, client: Client, reason: str) -> None:
        """Forget a client. The log says why: the server's own reason, if it has one."""
        self._close_socket(client.sock)
        self._clients.discard(client)
        tally = f"{client.sent} bytes echoed, {client.received - client.sent} dropped"
        log.info("%s disconnected: %s, %s", client.name, client.ending or reason, tally)

    # ---- Limits and shortages --------------------------------------------------------

    SELECT_CLIENTS = 500  # select() takes 1,024 descriptors, on Windows 512 sockets
    SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
    REST = 1.0  # seconds without accepting, after a shortage

    def _can_accept(self) -> bool:
        return len(self._clients) < self._max_clients and self._rest_until == inf

    def _watch_listeners(self) -> None:
        """Watch them while it can accept. Otherwise, the kernel queues who comes."""
        while self._can_accept() != self._accepting:  # repeats only after a failure
            self._accepting = not self._accepting
            try:
                for listener in self._listeners:
                    if self._accepting:
                        self._selector.register(listener, EVENT_READ)
                    else:
                        with contextlib.suppress(KeyError):  # It was not registered.
                            self._selector.unregister(listener)
            except FileExistsError:  # An earlier unregister() has failed, in silence.
                self._renew_selector()  # The new one watches no listener.
            except (OSError, MemoryError) as error:
                self._rest(error)  # Until it ends, nobody can be accepted.

    def _rest(self, error: OSError | MemoryError) -> None:
        """Accept nobody for a while: the listener would be ready again at once."""
        self._rest_until = self._now + self.REST
        self._deadline = min(self._deadline, self._rest_until)
        log.warning("cannot accept: %s; next try in %g s", plain(error), self.REST)

    def _renew_selector(self) -> None:
        """Replace a selector that has failed."""
        self._selector.close()  # first: descriptors may be short
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_receiver, EVENT_READ)
        self._accepting = False
        for client in list(self._clients):
            self._watch(client)

    def _check_inbox(self, client: Client, count: int) -> None:
        """Look for too long a line, and for a bare LF in the last `count` bytes."""
        if len(client.inbox) >= self._max_line + len(self._terminator):
            self._end(client, f"line longer than {self._max_line} bytes")
        elif not client.warned and client.inbox.find(b"\n", -count) >= 0:
            client.warned = True
            hint = "sent LF without CR, which ends no line"
            log.warning("%s %s: try nc -C (macOS: nc -c), or --lf", client.name, hint)

    # ---- Ending well -----------------------------------------------------------------

    TICK = 0.25  # seconds between two checks of the deadlines
    MOMENT = 0.5  # seconds of silence after EOF, in which a client may hang up
    LINGER = 5.0  # seconds that the end of a connection may take
    FIN_WAIT1 = 4  # Linux, include/net/tcp_states.h: EOF is not acknowledged yet

    def _end(self, client: Client, reason: str) -> None:
        """End a connection from our side: what is owed, then EOF, then time to hang up.

        What still comes is read and thrown away. Unread, it would make close() send a
        reset, which destroys what is on its way to the client (RFC 1122, 4.2.2.13).
        """
        if not client.ending:  # The first reason stays, if this is called again.
            client.ending = reason
            client.ending_since = self._now
        self._deadline = min(self._deadline, self._now + self.TICK)
        if not client.outbox:
            client.last_active = self._now
            with contextlib.suppress(OSError):  # It has gone. The next read says so.
                client.sock.shutdown(socket.SHUT_WR)

    def _check_deadlines(self, began: float) -> None:
        """End who is idle, close who has had its time, and set the next deadline."""
        if began < self._deadline:
            return  # None had come when this turn began.
        if began >= self._rest_until:
            self._rest_until = inf
        for client in list(self._clients):
            if not client.ending and began - client.last_active >= self._idle_timeout:
                self._end(client, f"idle for {self._idle_timeout:g} s")
            if client.ending and self._had_time(client, began):
                self._close(client, client.ending)
        pending = self._idle_timeout < inf or any(c.ending for c in self._clients)
        self._deadline = min(self._rest_until, began + self.TICK if pending else inf)

    def _had_time(self, client: Client, began: float) -> bool:
        """Tell if an ending client has been silent for a moment, or takes too long."""
        silent, ending = began - client.last_active, began - client.ending_since
        acknowledged = True  # if the system cannot tell: then silence must do
        with contextlib.suppress(OSError, AttributeError):
            info = client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
            acknowledged = info[0] != self.FIN_WAIT1  # Its first byte is the state.
        late = ending >= self.LINGER or silent >= self._idle_timeout  # it takes nothing
        return late or (silent >= self.MOMENT and acknowledged and not client.outbox)

    def _stop(self) -> None:
        """Take in those who wait, serve who is ready, then end every connection."""
        for listener in self._listeners:
            self._accept(listener, self._max_clients)
            self._close_socket(listener)
        self._deadline = self._now  # so that this turn does not wait
        self._turn()
        for client in self._clients:
            self._end(client, "server stopping")
        if self._clients:
            left = f"clients left: {len(self._clients)}, for {self.LINGER:g} s at most"
            log.info("stopping: %s; a second signal ends it at once, or close()", left)
        while self._clients and not self._closing:
            self._turn()

    # ---- Starting and stopping from outside ------------------------------------------

    def _open(self, port: int, hosts: str | Iterable[str] | None) -> None:
        with contextlib.ExitStack() as opened:
            for sock in (self._wake_receiver, self._wake_sender):
                opened.enter_context(sock).setblocking(False)
            opened.callback(self._close_all)
            self._selector.register(self._wake_receiver, EVENT_READ)
            if isinstance(self._selector, selectors.SelectSelector):
                self._max_clients = min(self._max_clients, self.SELECT_CLIENTS)
            self._listeners = listen(port, hosts)
            self.addresses = [host_and_port(s.getsockname()) for s in self._listeners]
            self._opened: contextlib.ExitStack[Any] = opened.pop_all()

    def _close_all(self) -> None:
        self._closing = True
        for client in list(self._clients):
            self._close(client, "server closed")
        for listener in self._listeners:
            self._close_socket(listener)
        self._selector.close()

    def _close_socket(self, sock: socket.socket) -> None:
        """Shut down and close a socket: a forked child's copy of it ends as well."""
        with contextlib.suppress(KeyError, ValueError):  # not registered, or closed
            self._selector.unregister(sock)
        with contextlib.suppress(OSError), sock:  # Not connected: only close it.
            sock.shutdown(socket.SHUT_RDWR)

    def shutdown(self) -> None:
        """Make `serve_forever()` return. Any thread or signal handler may call it."""
        self._stopping = True
        with contextlib.suppress(OSError):  # It is full of wake-ups, or closed.
            self._wake_sender.send(b"\0")

    def close(self) -> None:
        """Close everything at once; if `serve_forever()` runs, make it do so."""
        self._closing = True
        self.shutdown()
        self._opened.close()  # It is empty while serve_forever() runs.

    def __enter__(self) -> EchoServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_range(port: int, *others: float) -> None:
    """Raise ValueError, with name and value, for an argument that is out of range."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be 0 to 65535, not {port}")
    for name, value in zip(("max_line", "max_clients", "idle_timeout"), others):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, not {value}")


# ---- Addresses -----------------------------------------------------------------------

LOOPBACKS = [(socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0, 0, 0))]
NUMERIC = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV  # nothing is looked up
NO_IPV6 = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
BACKLOG = 4096  # connections that the kernel may queue; it has a limit of its own, too
OPTIONS = (  # Accepted sockets inherit them. Not every system knows them all.
    (socket.SOL_SOCKET, "SO_OOBINLINE", 1),  # an urgent byte is a byte like any other
    (socket.IPPROTO_TCP, "TCP_NODELAY", 1),  # short lines go out at once
    (socket.IPPROTO_TCP, "TCP_NOTSENT_LOWAT", 1 << 17),  # no room with so many unsent
    (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),  # probe a silent client
    (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 300),  # seconds until the first probe
    (socket.IPPROTO_TCP, "TCP_KEEPALIVE", 300),  # its name on macOS
    (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 75),  # seconds between probes
    (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),  # unanswered probes, then it counts as gone
)


def host_and_port(address: Any) -> tuple[str, int]:
    """Return both; the host keeps its scope, as in fe80::1%eth0."""
    host, port, *scope = address or ("?", 0)  # On macOS it may be gone: no address.
    if any(scope):
        with contextlib.suppress(OSError):  # The interface has gone.
            host = socket.getnameinfo(address, NUMERIC)[0]
    return host, port


def endpoint(host: str, port: int) -> str:
    """Return an address as people write it: 127.0.0.1:12321 or [::1]:12321."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def look_up(host: str, port: int) -> list[tuple[int, Any]]:
    """Return a name's (family, address) pairs. Raises OSError, ValueError."""
    try:
        if not host:
            raise UnicodeError  # It would stand for every address, by accident.
        found: Any = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise ValueError(f"hosts (-b) must not be {host!r}") from None
    except OSError as error:
        raise cannot_listen(host, port, error) from None
    return list(dict.fromkeys((family, address) for family, *_, address in found))


def cannot_listen(host: str, port: int, error: OSError) -> OSError:
    """Return the error with a text that names the address."""
    reason = plain(error).partition(" (while ")[0]  # what create_server() has to add
    return OSError(error.errno, f"cannot listen on {endpoint(host, port)}: {reason}")


def listen(port: int, hosts: Any, tries: int = 10) -> list[socket.socket]:
    """Listen on every address of every host, on one port. Raises like look_up()."""
    # No host at all becomes "", which look_up() refuses. An iterator is read only once.
    names = [hosts] if isinstance(hosts, str) else list(hosts or ()) or [""]
    groups: Any = [LOOPBACKS] if hosts is None else [look_up(n, port) for n in names]
    listeners: list[socket.socket] = []
    with contextlib.ExitStack() as opened:
        for group in groups:
            for family, (host, _, *scope) in group:
                bound = listeners[0].getsockname()[1] if listeners else port
                where = (host, bound, *scope)
                try:
                    sock = socket.create_server(where, family=family, backlog=BACKLOG)
                except OSError as error:
                    no_ipv6 = family == socket.AF_INET6 and error.errno in NO_IPV6
                    if no_ipv6 and socket.AF_INET in dict(group):
                        continue  # The IPv4 address of the same name must do.
                    if port == 0 and error.errno == errno.EADDRINUSE and tries:
                        opened.close()  # It is free on one address, but not on all.
                        return listen(port, None if hosts is None else names, tries - 1)
                    raise cannot_listen(host, bound, error) from None
                listeners.append(opened.enter_context(sock))
                sock.setblocking(False)
                for level, option, value in OPTIONS:
                    with contextlib.suppress(AttributeError, OSError):  # not known here
                        sock.setsockopt(level, getattr(socket, option), value)
        opened.pop_all()
    return listeners


# ---- The log -------------------------------------------------------------------------


def plain(error: BaseException) -> str:
    """Return the reason alone: Connection reset by peer, without [Errno 104]."""
    return getattr(error, "strerror", None) or str(error) or "out of memory"


def log_lines(name: str, lines: list[bytes], most: int = 80, width: int = 80) -> None:
    """Log the first lines of a read, each escaped and cut short."""
    for line in lines[:most]:
        log.debug("%s %r%s", name, line[:width], "..." if len(line) > width else "")
    if len(lines) > most:
        log.debug("%s and more lines: %d", name, len(lines) - most)


class LogHandler(logging.Handler):
    """Writes the log to stdout. Drops a line for which there is no room at once."""

    def __init__(self) -> None:
        super().__init__()
        # A terminal may stop (Ctrl-S), and is not ours alone to make non-blocking.
        with contextlib.suppress(OSError, AttributeError, ValueError):  # no terminal
            stdout = sys.stdout.fileno()
            tty = os.open(os.ttyname(stdout), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            os.dup2(tty, stdout)
            os.close(tty)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line of ASCII, if it can be written."""
        line = self.format(record).encode("ascii", "backslashreplace") + b"\n"
        with contextlib.suppress(OSError, AttributeError, ValueError):
            stdout = sys.stdout.fileno()
            # POSIX: a pipe with room takes 512 bytes: a whole line. Windows may wait.
            if os.name == "nt" or select.select([], [stdout], [], 0)[1]:
                os.write(stdout, line)


# ---- The command line ----------------------------------------------------------------


def parse_arguments() -> tuple[argparse.ArgumentParser, dict[str, Any]]:
    """Return the parser, which can report errors, and the options that were given."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.description = "Echo lines to TCP clients, by default on both loopbacks."
    parser.add_argument("port", nargs="?", type=int, default=12321, help="0 is any")
    parser.add_argument("-b", "--bind", action="append", metavar="ADDRESS")
    parser.add_argument("--lf", action="store_true", help="lines end with LF alone")
    parser.add_argument("--max-line", type=int, metavar="BYTES", help="default: 1 MiB")
    parser.add_argument("--max-clients", type=int, metavar="N", help="default: 1000")
    parser.add_argument("--idle-timeout", type=float, metavar="SECONDS", help="or none")
    parser.add_argument("--version", action="version", version=f"echo.py {__version__}")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("-q", action="store_true", help="once up, log warnings only")
    either.add_argument("-v", action="store_true", help="log each echoed line, too")
    return parser, vars(parser.parse_args())


def raise_descriptor_limit(clients: int) -> None:
    """Let this process have the descriptors that so many clients need, or warn."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows
        import resource

        needed = clients + 32  # for listeners, the selector, and what was inherited
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(needed, hard)), hard))
        if hard < needed:
            log.warning("too few descriptors for %d clients: see ulimit -n", clients)


def main() -> None:
    """Serve until a signal comes, as the command line says."""
    wanted = ("SIGINT", "SIGTERM", "SIGBREAK")  # Windows: Ctrl-Break, a closed console
    stop_signals = [number for number in signal.Signals if number.name in wanted]
    server, ignore_until = None, 0.0

    def _on_signal(*_: object) -> None:
        nonlocal ignore_until
        if not server:
            sys.exit()  # Looking up a name may take long.
        now, is_first = time.monotonic(), ignore_until == 0
        if now >= ignore_until:
            ignore_until = now + 1  # A wrapper may pass on the same signal again.
            server.shutdown() if is_first else server.close()

    for number in stop_signals:
        signal.signal(number, _on_signal)
    parser, options = parse_arguments()
    quiet, verbose = options.pop("q", False), options.pop("v", False)
    try:
        server = EchoServer(hosts=options.pop("bind", None), **options)
        signal.set_wakeup_fd(server._wake_sender.fileno(), warn_on_full_buffer=False)
        server._opened.callback(signal.set_wakeup_fd, -1)  # before it is closed
    except ValueError as error:
        parser.error(str(error).replace("max_", "--max-").replace("idle_", "--idle-"))
    except (OSError, MemoryError) as error:
        sys.exit(f"{parser.prog}: {plain(error)}")
    log.addHandler(LogHandler())
    log.setLevel(logging.INFO)
    for address in server.addresses:
        log.info("listening on %s", endpoint(*address))
    raise_descriptor_limit(server._max_clients)
    log.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else log.level)
    server.serve_forever()
    # During Python's exit, or within signal.signal(), a signal would show a traceback.
    with contextlib.suppress(AttributeError):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    for number in stop_signals:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
