"""What echo.py promises, in the order of its README; then its command line, and it as a module.

Most tests drive an EchoServer by hand: settle() gives it turns until nothing is ready any more, so
what comes next is certain. Where time or other threads matter, it runs in a thread (`start`), and
the command line, the signals and the log are tested on the script as a process (`run`).
"""

import contextlib
import errno
import itertools
import logging
import math
import os
import random
import re
import runpy
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest

import echo

pytestmark = pytest.mark.timeout(60)

SCRIPT = os.path.abspath(echo.__file__)
COMMAND = (sys.executable, SCRIPT)
PATIENCE = 10  # seconds that a socket, a process or a thread may take before a test fails
LIMIT = 10  # bytes, where a test wants lines to be too long
BUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # so a flush counts
LINE = b"x" * 1022 + b"\r\n"
FLOOD = memoryview(LINE * (1 << 16))  # 64 MiB: more than the kernel holds for a connection


def can_listen(host, port=0):
    with contextlib.suppress(OSError):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
        return True
    return False


LOOPBACKS = [host for host in echo.LOOPBACKS if can_listen(host)]  # a container may have no ::1
READY_LINES = len(LOOPBACKS)  # of a start without -b
needs_ipv6 = pytest.mark.skipif("::1" not in LOOPBACKS, reason="this machine has no ::1")
needs_127_0_0_2 = pytest.mark.skipif(
    not can_listen("127.0.0.2"), reason="the loopback of this system has one address only"
)


# Helpers, one idea each


def connect(address):
    if isinstance(address, echo.EchoServer):
        address = address.addresses[0]
    sock = socket.create_connection(address, timeout=PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a small piece is sent at once
    return sock


def connect_when_ready(address):
    """Connect to a server whose ready line cannot be seen."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionRefusedError):
            return connect(address)
    return pytest.fail("it never listened")


def read_all(sock):
    """Return all that comes until EOF."""
    return b"".join(iter(lambda: sock.recv(1 << 20), b""))


def read(sock, count):
    """Return the next `count` bytes, or fewer if EOF comes first."""
    data = bytearray()
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        if not chunk:
            break
        data += chunk
    return bytes(data)


def ask(sock, line=b"are you there?\r\n"):
    sock.sendall(line)
    return read(sock, len(line)) == line


def same(got, expected):
    """Compare; where both are large and differ, pytest would explain it for minutes."""
    return got == expected


@contextlib.contextmanager
def within(seconds):
    """Fail if the block takes longer."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def serve(server):
    """Let a server run in a thread; return that."""
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    return thread


def join(thread):
    thread.join(PATIENCE)
    assert not thread.is_alive()


def only_client(server):
    """Return what the server, which is driven by hand, knows of its only client."""
    settle(server)
    (client,) = server._clients
    return client


def wait_until_refused(address):
    with pytest.raises(ConnectionRefusedError):
        while True:
            with contextlib.suppress(ConnectionResetError):  # it was still in the queue
                connect(address).close()


def flood(sock):
    """Send lines, read nothing, until nothing is taken for a while. Return what was sent."""
    sock.settimeout(0.3)
    sent = 0
    with contextlib.suppress(socket.timeout):
        while sent < len(FLOOD):
            sent += sock.send(FLOOD[sent : sent + (1 << 16)])
    sock.settimeout(PATIENCE)
    assert sent < len(FLOOD), "nothing made it wait"
    return bytes(FLOOD[:sent])


def reset(sock):
    """Close so that the peer sees a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def settle(server):
    """Give turns until nothing is ready any more. A server that always finds work fails here."""
    for _ in range(5000):
        server._watch_listeners()
        if not server._selector.select(0.01):
            return
        server._run_once(0)
    pytest.fail("the server never came to rest")


def is_served(client, server):
    """Tell whether a server that is driven by hand echoes a line."""
    client.sendall(b"hello\r\n")
    settle(server)
    return client.recv(100) == b"hello\r\n"


def stall(server):
    """Connect and send more than the kernel holds; return the socket and what it sent."""
    client = connect(server)
    client.setblocking(False)
    sent, before = 0, -1
    while sent > before:
        before = sent
        with contextlib.suppress(BlockingIOError):
            while sent < len(FLOOD):
                sent += client.send(FLOOD[sent : sent + (1 << 18)])
        settle(server)
    client.settimeout(PATIENCE)
    assert sent < len(FLOOD), "nothing made it wait"
    return client, bytes(FLOOD[:sent])


def drain(sock, server):
    """Read from a server that is driven by hand, until nothing more comes."""
    data, before = bytearray(), -1
    sock.setblocking(False)
    while len(data) > before:
        before = len(data)
        settle(server)
        with contextlib.suppress(BlockingIOError):
            while chunk := sock.recv(1 << 20):
                data += chunk
    sock.settimeout(PATIENCE)
    return bytes(data)


def framed(pieces, terminator=b"\r\n", max_line=echo.MAX_LINE):
    """Feed the pieces to a new client; return what is to be echoed, and the client."""
    client = echo.Client(None, "somebody", math.inf)
    lines = [client.feed(memoryview(piece), terminator, max_line) for piece in pieces]
    return b"".join(lines), client


def rule(stream, terminator=b"\r\n"):
    """The contract: what a client that sends this stream reads."""
    return stream[: stream.rfind(terminator) + len(terminator)] if terminator in stream else b""


def cuts(stream):
    """Yield every way to cut the stream into pieces."""
    for places in itertools.product((False, True), repeat=max(len(stream) - 1, 0)):
        edges = [0, *(i + 1 for i, cut in enumerate(places) if cut), len(stream)]
        yield [stream[a:b] for a, b in zip(edges, edges[1:])]


@pytest.fixture
def server():
    """A server to drive by hand."""
    with echo.EchoServer(0, ["127.0.0.1"]) as server:
        yield server


@pytest.fixture
def strict_server():
    """The same, with lines of LIMIT bytes at most."""
    with echo.EchoServer(0, ["127.0.0.1"], max_line=LIMIT) as server:
        yield server


@pytest.fixture
def start():
    """Start servers that run in threads, and stop them."""
    with contextlib.ExitStack() as stack:

        def start(hosts=("127.0.0.1",), **options):
            server = stack.enter_context(echo.EchoServer(0, hosts, **options))
            server.thread = serve(server)
            stack.callback(join, server.thread)
            stack.callback(server.shutdown)
            return server

        yield start


class Script:
    """echo.py as a process; `addresses` are those of its ready lines."""

    def __init__(self, *arguments, ready=READY_LINES, command=COMMAND, **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        self.process = subprocess.Popen([*command, *arguments], env=BUFFERED, **options)
        self.ready = [self.line() for _ in range(ready)]
        matches = [re.fullmatch(r"listening on \[?(.*?)\]?:(\d+)", line) for line in self.ready]
        assert all(matches), self.stop()
        self.addresses = [(m[1], int(m[2])) for m in matches]

    def line(self):
        return self.process.stdout.readline().decode("ascii").rstrip("\n")

    def stop(self, number=signal.SIGTERM):
        """Send a signal; return the status, the rest of stdout, and stderr."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, (out or b"").decode("ascii").splitlines(), err


@pytest.fixture
def run():
    """Start the script; kill what is left of it at the end."""
    with contextlib.ExitStack() as stack:

        def run(*arguments, **options):
            script = Script(*arguments, **options)
            stack.enter_context(script.process)
            stack.callback(script.process.kill)
            return script

        yield run


def run_to_end(*arguments):
    """Run the script, which is to end by itself; return its status, stdout and stderr."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=PATIENCE)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def call(monkeypatch, capsys):
    """Do the same in this process, which is quicker."""
    monkeypatch.setenv("RES_OPTIONS", "timeout:1 attempts:1")  # for names where no DNS answers

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["echo.py", *arguments])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(SCRIPT, run_name="__main__")
        status, (out, err) = exit.value.code or 0, capsys.readouterr()
        return (1, out, f"{err}{status}\n") if isinstance(status, str) else (status, out, err)

    return call


def break_method(monkeypatch, method, error, times=1):
    """Make a method of all sockets raise so many times, and then work again."""
    real = getattr(socket.socket, method)
    errors = [OSError(error, os.strerror(error)) if isinstance(error, int) else error] * times

    def stand_in(*arguments):
        if errors:
            raise errors.pop()
        return real(*arguments)

    monkeypatch.setattr(socket.socket, method, stand_in)


def count_calls(monkeypatch, method):
    """Return a list that grows by one with each call of a method of any socket."""
    real, calls = getattr(socket.socket, method), []
    monkeypatch.setattr(socket.socket, method, lambda *a: calls.append(a) or real(*a))
    return calls


def create_server_that_fails(monkeypatch, number, family, times=1):
    """Make socket.create_server fail for this family, so many times."""
    real, failures = socket.create_server, [OSError(number, "no") for _ in range(times)]

    def stand_in(address, **options):
        if options["family"] == family and failures:
            raise failures.pop()
        return real(address, **options)

    monkeypatch.setattr(socket, "create_server", stand_in)


# Lines


@pytest.mark.parametrize("lf", [False, True])
@pytest.mark.parametrize(
    "stream",
    [b"", b"\r", b"\n", b"\r\n", b"\r\n\r\na", b"\n\r\n\r\r\n\n", b"a\r\nb\r\n\r\r\nc",
     b"ab\ncd\rx\r\n\0"],
)  # fmt: skip
def test_lines_come_back_exactly_however_the_stream_is_cut(stream, lf):
    terminator = b"\n" if lf else b"\r\n"
    for pieces in cuts(stream):
        echoed, client = framed(pieces, terminator)
        assert echoed == rule(stream, terminator)
        assert client.inbox == stream[len(echoed) :]


@pytest.mark.parametrize("seed", range(20))
def test_random_streams_are_answered_as_the_rule_says(server, seed):
    chance = random.Random(seed)
    stream = bytes(chance.choices(b"ab\r\r\n\n\0\xff", k=chance.randrange(2000)))
    stream = stream.replace(b"a\n", b"\r\n")
    with connect(server) as client:
        left = stream
        while left:
            step = chance.randrange(1, 400)
            client.sendall(left[:step])
            left = left[step:]
            server._run_once(0)
        client.shutdown(socket.SHUT_WR)
        settle(server)
        assert read_all(client) == rule(stream)


def test_a_line_comes_back_as_soon_as_it_is_complete_and_no_part_of_one_before(server):
    with connect(server) as client:
        client.sendall(b"hel")
        settle(server)
        client.sendall(b"lo\r\nwor")
        settle(server)
        assert client.recv(100) == b"hello\r\n"
        client.sendall(b"ld\r\n")
        settle(server)
        assert client.recv(100) == b"world\r\n"


def test_a_long_line_in_small_pieces_is_searched_once():
    pieces = [b"\n" + b"x" * 63, *[b"x" * 64] * (1 << 15)]  # 2 MiB
    before = time.process_time()
    echoed, _ = framed([*pieces, b"\r\n"], max_line=1 << 30)
    assert time.process_time() - before < 3  # seconds; several times that if it starts over
    assert echoed == b"".join(pieces) + b"\r\n"


def test_bare_lf_is_explained_once_per_connection(server, caplog):
    caplog.set_level(logging.INFO, "echo")
    with connect(server) as one, connect(server) as other:
        for client, data in (one, b"a\n"), (one, b"b\n\n"), (other, b"x\r\nc\nd"):
            client.sendall(data)
            settle(server)
    hints = [record for record in caplog.records if "LF without CR" in record.message]
    assert len(hints) == 2 == len({hint.message for hint in hints})
    assert all(hint.message.endswith(": try nc -C (macOS: nc -c), or --lf") for hint in hints)
    assert all(hint.levelno == logging.INFO for hint in hints)


@pytest.mark.parametrize(
    ("data", "lf"),
    [(b"a\nb\r\nc\r", False), (b"a\nb", True), (b"x" * 11 + b"\r\n", False), (b"x\n" * 11, True)],
)
def test_there_is_no_hint_where_no_line_waits_for_its_cr(data, lf, caplog):
    caplog.set_level(logging.INFO, "echo")
    framed([data], b"\n" if lf else b"\r\n", LIMIT)
    assert not caplog.messages


# Clients


def test_many_clients_in_halves_get_each_its_own(start):
    server = start()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(100)]
        for client in clients:
            client.sendall(b"I am num")
        for i, client in enumerate(clients):
            client.sendall(b"ber %d\r\n" % i)
        for i, client in enumerate(clients):
            assert client.recv(100) == b"I am number %d\r\n" % i


def test_a_crowd_that_comes_at_once_waits_in_the_queue(server):
    with contextlib.suppress(OSError), open("/proc/sys/net/core/somaxconn") as limit:
        if int(limit.read()) < 200:
            pytest.skip("the kernel's own limit is lower")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in range(200)]
        settle(server)
        assert len(server._clients) == len(clients)


def test_a_client_that_does_not_read_is_not_read_from_either_and_delays_nobody(server):
    stalled, _ = stall(server)
    with stalled, connect(server) as other:
        (client,) = server._clients
        assert len(client.inbox) + len(client.outbox) <= echo.MAX_LINE + echo.RECEIVE_SIZE
        assert is_served(other, server)


def test_memory_for_a_client_stays_within_one_line_and_one_read(server):
    data = memoryview((b"x" * echo.MAX_LINE + b"\r\n") * 32)
    sent = held = 0
    with connect(server) as client:
        inside = only_client(server)
        client.setblocking(False)
        while not inside.outbox:
            with contextlib.suppress(BlockingIOError):
                sent += client.send(data[sent:])
            server._run_once(0)
            held = max(held, len(inside.inbox) + len(inside.outbox))
        assert echo.MAX_LINE / 2 < held <= echo.MAX_LINE + echo.RECEIVE_SIZE


def test_a_client_that_half_closes_and_reads_late_gets_every_byte(start):
    server = start()
    with connect(server) as late, connect(server) as other:
        sent = flood(late)
        assert ask(other)
        late.shutdown(socket.SHUT_WR)
        assert ask(other)
        assert same(read_all(late), rule(sent))


def test_after_a_stall_a_client_is_served_as_before(start):
    with connect(start()) as client:
        sent = flood(client)
        complete = rule(sent)
        assert same(read(client, len(complete)), complete)
        client.sendall(LINE[len(sent) - len(complete) :])  # the rest of the line that was cut
        assert read(client, len(LINE)) == LINE
        assert ask(client)


def test_a_client_whose_bytes_go_out_in_small_parts_gets_every_byte(server):
    line = bytes(range(128, 256)) * 1000 + b"\r\n"
    with connect(server) as client:
        inside = only_client(server)
        inside.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10000)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 10000)
        client.setblocking(False)
        sent, got, deadline = 0, b"", time.monotonic() + PATIENCE
        while len(got) < len(line) and time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                sent += client.send(line[sent:])
            server._run_once(0)
            with contextlib.suppress(BlockingIOError):
                got += client.recv(10000)
        assert same(got, line)
        assert inside.received == inside.sent == len(line)


def test_a_ready_client_costs_one_read_a_turn(server, monkeypatch):
    reads = count_calls(monkeypatch, "recv_into")
    with connect(server) as one, connect(server) as other:
        settle(server)
        one.sendall(b"x" * 3 * echo.RECEIVE_SIZE)
        other.sendall(b"hello\r\n")
        server._run_once(1)
        assert len(reads) == 2
        assert other.recv(100) == b"hello\r\n"


@pytest.mark.parametrize(("data", "count"), [(b"hello\r\n" * 9, 1), (b"hel", 0)])
def test_complete_lines_cost_one_send_and_half_a_line_none(server, data, count, monkeypatch):
    with connect(server) as client:
        settle(server)
        client.sendall(data)
        sends = count_calls(monkeypatch, "send")
        settle(server)
        assert len(sends) == count


def test_waiting_costs_nothing_whatever_the_clients_wait_for(server):
    stalled, _ = stall(server)
    half_closed, _ = stall(server)
    drained, sent = stall(server)
    with stalled, half_closed, drained, connect(server), connect(server) as mid_line:
        half_closed.shutdown(socket.SHUT_WR)
        mid_line.sendall(b"hel")
        assert same(drain(drained, server), rule(sent))
        assert len(server._clients) == 5
        assert server._selector.select(0.1) == []


@pytest.mark.parametrize("state", ["before accept", "mid-line", "owed"])
def test_a_reset_ends_that_client_alone(server, state, caplog):
    caplog.set_level(logging.INFO, "echo")
    with connect(server) as other:
        settle(server)
        if state == "owed":
            victim, _ = stall(server)
        else:
            victim = connect(server)
            victim.sendall(b"hel")
        if state == "mid-line":
            settle(server)
        reset(victim)
        settle(server)
        assert len(server._clients) == 1
        assert sum("disconnected: [Errno" in text for text in caplog.messages) == 1
        assert is_served(other, server)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(number, f"[Errno {number}] {os.strerror(number)}")
     for number in (errno.ECONNRESET, errno.ETIMEDOUT, errno.EPIPE, errno.ENOBUFS)]
    + [(MemoryError(), "out of memory")],
)  # fmt: skip
@pytest.mark.parametrize("method", ["recv_into", "send", "setsockopt", "setblocking"])
def test_an_error_ends_that_client_alone(server, method, error, reason, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "echo")
    with connect(server) as other:
        settle(server)
        with connect(server) as victim:
            break_method(monkeypatch, method, error)
            victim.sendall(b"hello\r\n")
            settle(server)
            assert len(server._clients) == 1
            assert f" disconnected: {reason}, 0 bytes echoed" in caplog.messages[-1]
            assert is_served(other, server)


@pytest.mark.parametrize("method", ["accept", "recv_into", "send", "setsockopt"])
def test_what_is_no_fault_of_a_client_is_not_taken_for_one(server, method, monkeypatch):
    with connect(server) as client:
        break_method(monkeypatch, method, KeyboardInterrupt())
        client.sendall(b"hello\r\n")
        with pytest.raises(KeyboardInterrupt):
            settle(server)


def test_a_client_without_an_address_ends_nobody_else(server, monkeypatch, caplog):
    """On macOS accept() may return none, for a client that has hung up already."""
    caplog.set_level(logging.INFO, "echo")
    accept = socket.socket.accept
    with monkeypatch.context() as patch, connect(server):
        patch.setattr(socket.socket, "accept", lambda listener: (accept(listener)[0], None))
        settle(server)
    assert caplog.messages[0] == "?:0 connected"
    with connect(server) as client:
        assert is_served(client, server)


def test_running_out_of_memory_ends_that_client_alone(server, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "echo")
    with connect(server) as other, connect(server) as greedy:
        settle(server)
        monkeypatch.setattr(echo.Client, "feed", lambda *_: bytearray(1 << 62))
        greedy.sendall(b"hel")
        settle(server)
        assert greedy.recv(1) == b""
        assert caplog.messages[-1].endswith(" out of memory, 0 bytes echoed, 3 dropped")
        assert is_served(other, server)


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.ECONNRESET])
def test_a_connection_that_is_gone_before_it_is_accepted_stops_nothing(
    server, number, monkeypatch, caplog
):
    break_method(monkeypatch, "accept", number)
    with connect(server) as client:
        assert is_served(client, server)
    assert not caplog.messages


def test_an_accept_that_finds_nobody_does_not_wait():
    with echo.EchoServer(0) as server:
        server._run_once(0)
        for listener in server._listeners:
            assert listener.gettimeout() == 0
            server._accept(listener)
        assert not server._clients


@pytest.mark.parametrize("method", ["accept", "recv_into", "send"])
def test_readiness_is_but_a_hint(server, method, monkeypatch):
    break_method(monkeypatch, method, errno.EAGAIN, 3)
    with connect(server) as client:
        assert is_served(client, server)


def test_the_socket_of_a_client_does_not_wait(server):
    with connect(server):
        assert only_client(server).sock.gettimeout() == 0


def test_connections_are_kept_alive_and_short_lines_are_not_held_back(server):
    with connect(server):
        sock = only_client(server).sock
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_idle_clients_go_whatever_they_wait_for_and_a_busy_one_stays(caplog):
    caplog.set_level(logging.INFO, "echo")
    with echo.EchoServer(0, ["127.0.0.1"], idle_timeout=1.0) as server:
        stalled, _ = stall(server)
        with stalled, connect(server) as quiet, connect(server) as half, connect(server) as busy:
            half.sendall(b"hel")
            started = time.monotonic()
            settle(server)
            with within(3):
                while len(server._clients) > 1:
                    busy.sendall(b"hello\r\n")
                    server._run_once(echo.TICK)
                    assert read(busy, 7) == b"hello\r\n"
            assert time.monotonic() - started >= 1
            assert read_all(quiet) == b""
    assert sum(" disconnected: idle for 1 s, " in text for text in caplog.messages) == 3


@pytest.mark.parametrize("ending", [b"x" * 11, b"a\r\n" + b"x" * 11])
def test_a_client_that_is_ended_has_time_whatever_its_deadline_was(strict_server, ending):
    with connect(strict_server) as client:
        inside = only_client(strict_server)
        inside.deadline = strict_server._now + 0.1
        client.sendall(ending)
        settle(strict_server)
        assert inside.deadline > strict_server._now + 1


def test_taking_what_is_owed_counts_as_activity(server):
    stalled, _ = stall(server)
    with stalled:
        inside = only_client(server)
        inside.deadline = server._now + PATIENCE
        stalled.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while stalled.recv(1 << 20):
                pass
        server._run_once(1)
        assert inside.deadline == math.inf


def test_clients_that_come_and_go_leave_nothing_behind(server):
    settle(server)
    before = len(server._selector.get_map())
    for _ in range(20):
        with connect(server) as client:
            client.sendall(b"hello\r\nhel")
            settle(server)
        settle(server)
    assert not server._clients
    assert len(server._selector.get_map()) == before


@pytest.mark.parametrize("selector", ["DefaultSelector", "PollSelector", "SelectSelector"])
def test_selectors_behave_the_same(selector, monkeypatch):
    if not hasattr(selectors, selector):
        pytest.skip(f"this platform has no {selector}")
    monkeypatch.setattr(selectors, "DefaultSelector", getattr(selectors, selector))
    with echo.EchoServer(0, ["127.0.0.1"]) as server:
        stalled, sent = stall(server)
        with stalled, connect(server) as other:
            assert is_served(other, server)
            other.sendall(b"hel")
            stalled.shutdown(socket.SHUT_WR)
            assert same(drain(stalled, server), rule(sent))
            assert stalled.recv(1) == b""


# Limits


def test_the_numbers_are_those_that_are_promised():
    assert (echo.PORT, echo.MAX_LINE, echo.RECEIVE_SIZE) == (12321, 1048576, 131072)
    assert (echo.MAX_CLIENTS, echo.MAX_CLIENTS_OF_SELECT) == (1000, 500)
    assert (echo.LINGER, echo.REST, echo.TICK, echo.SHOWN) == (5, 1, 0.25, 80)


TOO_LONG = {  # what is sent: what comes back, at a limit of LIMIT bytes a line
    b"x" * 10 + b"\r\n": b"x" * 10 + b"\r\n",
    b"x" * 11 + b"\r\n": b"",
    b"x" * 11: b"",
    b"x" * 10 + b"\r\r\n": b"",
    b"a\r\n" + b"x" * 11 + b"\r\nb\r\n": b"a\r\n",
    b"a\r\n" * 9 + b"\r" * 11 + b"\r\nb\r\n": b"a\r\n" * 9,
    b"x" * 10 + b"\r\n" + b"\n" * 12 + b"\r\n": b"x" * 10 + b"\r\n",
}


@pytest.mark.parametrize(("stream", "echoed"), TOO_LONG.items())
def test_a_line_over_the_limit_ends_the_connection_however_it_is_cut(stream, echoed):
    places = itertools.combinations_with_replacement(range(len(stream)), 2)
    threes = [[stream[:i], stream[i:j], stream[j:]] for i, j in places]
    for pieces in [[bytes([byte]) for byte in stream], *threes]:
        got, client = framed(pieces, max_line=LIMIT)
        assert got == echoed
        assert bool(client.ending) == (got != stream)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("stream", "echoed"), TOO_LONG.items())
def test_a_client_over_the_limit_reads_the_lines_before_it_and_eof(
    strict_server, stream, echoed, whole
):
    with connect(strict_server) as client:
        for piece in [stream] if whole else [stream[i : i + 4] for i in range(0, len(stream), 4)]:
            client.sendall(piece)
            settle(strict_server)
        if echoed == stream:
            client.shutdown(socket.SHUT_WR)
            settle(strict_server)
        assert read_all(client) == echoed


def test_the_limit_of_lf_lines_does_not_count_the_lf():
    for stream in b"x" * 10 + b"\n", b"x" * 10:
        assert not framed([stream], b"\n", LIMIT)[1].ending
    for stream in b"x" * 11 + b"\n", b"x" * 11, b"x" * 10 + b"\r":
        assert framed([stream], b"\n", LIMIT)[1].ending


def test_a_carriage_return_past_the_limit_may_still_be_of_the_terminator():
    _, client = framed([b"x" * 10 + b"\r"], max_line=LIMIT)
    assert not client.ending


def test_a_client_over_the_limit_gets_what_is_owed_before_eof(strict_server, monkeypatch):
    break_method(monkeypatch, "send", errno.EAGAIN)
    with connect(strict_server) as client:
        client.sendall(b"hello\r\n" + b"x" * 12)
        settle(strict_server)
        assert read_all(client) == b"hello\r\n"


def test_a_client_that_goes_on_sending_reads_all_it_is_owed_and_is_gone_in_time(start, monkeypatch):
    monkeypatch.setattr(echo, "LINGER", 0.5)
    lines = b"hello\r\n" * 1000
    with connect(start(max_line=LIMIT)) as client, within(3):
        client.sendall(lines + b"x" * 10 * echo.RECEIVE_SIZE)
        assert read_all(client) == lines
        with pytest.raises(ConnectionError):
            while True:
                client.sendall(b"x" * 1000)


def test_what_follows_a_line_over_the_limit_is_thrown_away(strict_server):
    with connect(strict_server) as client:
        inside = only_client(strict_server)
        for _ in range(20):
            client.sendall(b"x" * 100000)
            settle(strict_server)
        assert inside.ending == "line longer than 10 bytes"
        assert inside.received == 2000000
        assert len(inside.inbox) <= 100000
        assert not inside.outbox


def test_client_n_plus_one_waits_at_no_cost_and_is_served_when_one_leaves():
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(echo.EchoServer(0, ["127.0.0.1"], max_clients=2))
        first, _, third = [stack.enter_context(connect(server)) for _ in range(3)]
        third.sendall(b"hello\r\n")
        settle(server)
        assert len(server._clients) == 2
        assert server._selector.select(0.1) == []
        first.close()
        settle(server)
        assert third.recv(100) == b"hello\r\n"


@needs_127_0_0_2
def test_the_last_place_is_given_once_when_two_come_in_one_turn():
    with echo.EchoServer(0, ["127.0.0.1", "127.0.0.2"], max_clients=1) as server:
        one, other = server.addresses
        with connect(one), connect(other):
            settle(server)
            assert len(server._clients) == 1


@pytest.mark.parametrize(("selector", "most"), [("SelectSelector", 500), ("PollSelector", 1000)])
def test_select_is_not_given_more_descriptors_than_it_can_watch(selector, most, monkeypatch):
    if not hasattr(selectors, selector):
        pytest.skip(f"this platform has no {selector}")
    monkeypatch.setattr(selectors, "DefaultSelector", getattr(selectors, selector))
    for asked, allowed in (echo.MAX_CLIENTS, most), (7, 7):
        with echo.EchoServer(0, ["127.0.0.1"], max_clients=asked) as server:
            assert server._max_clients == allowed


@needs_127_0_0_2
@pytest.mark.parametrize(
    ("error", "reason"),
    [(number, os.strerror(number))
     for number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)]
    + [(MemoryError(), "out of memory")],
)  # fmt: skip
def test_out_of_descriptors_accepting_rests_and_the_clients_that_are_in_are_served(
    error, reason, monkeypatch, caplog
):
    monkeypatch.setattr(echo, "REST", 0.3)
    hosts = ["127.0.0.1", "127.0.0.2"]
    with echo.EchoServer(0, hosts) as server, connect(server) as inside:
        settle(server)
        break_method(monkeypatch, "accept", error)
        with connect(server.addresses[0]) as waiting, connect(server.addresses[1]):
            started = time.monotonic()
            server._run_once(1)
            assert is_served(inside, server)
            assert server._selector.select(0.1) == []
            assert len(server._clients) == 1
            waiting.sendall(b"hello\r\n")
            with within(3):
                while len(server._clients) < 3:
                    server._run_once(echo.TICK)
            assert time.monotonic() - started >= 0.3
            settle(server)
            assert waiting.recv(100) == b"hello\r\n"
    (warning,) = [text for text in caplog.messages if text.startswith("cannot accept: ")]
    assert warning.endswith(f"{reason}; next try in 0.3 s")


# Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_status_0_though_clients_sit_idle(run, number):
    script = run("0")
    with connect(script.addresses[0]) as client, connect(script.addresses[-1]) as half_line:
        assert ask(client)
        half_line.sendall(b"hel")
        assert ask(client)
        with within(1):
            status, lines, err = script.stop(number)
        assert (status, err) == (0, b"")
        assert read_all(client) == read_all(half_line) == b""
    assert sum(" disconnected: server stopping, " in line for line in lines) == 2


def test_a_line_that_came_before_the_stop_is_echoed(server):
    with connect(server) as client:
        settle(server)
        client.sendall(b"hello\r\n")
        server.shutdown()
        server.serve_forever()
        assert client.recv(100) == b"hello\r\n"


def test_stopping_sends_a_slow_reader_all_that_is_owed_and_then_eof(start):
    server = start()
    with connect(server) as slow:
        sent = flood(slow)
        (client,) = server._clients
        owed = client.sent + len(client.outbox)
        server.shutdown()
        got = read_all(slow)
    assert len(got) >= owed
    assert same(got, rule(sent[: len(got)]))


def test_stopping_refuses_new_connections_while_it_waits_for_a_slow_reader(start):
    server = start()
    with connect(server) as slow:
        flood(slow)
        server.shutdown()
        wait_until_refused(server)
        assert server.thread.is_alive()
        read_all(slow)


def test_who_comes_after_the_stop_is_not_accepted(server):
    server.shutdown()
    with connect(server):
        server._run_once(0)
        assert not server._clients


def test_stopping_waits_for_a_client_that_never_reads_no_longer_than_promised(start, monkeypatch):
    monkeypatch.setattr(echo, "LINGER", 0.3)
    server = start()
    with connect(server) as client:
        flood(client)
        started = time.monotonic()
        server.shutdown()
        with within(1.2):
            join(server.thread)
        assert time.monotonic() - started >= 0.3
        assert not server._clients


def test_stopping_does_not_reset_a_client_whose_input_is_unread(server, monkeypatch):
    monkeypatch.setattr(echo, "LINGER", 0.5)
    lines = LINE * 400  # more than the client's kernel takes, so a reset would destroy the rest
    with connect(server) as client:
        client.sendall(lines)
        assert not only_client(server).outbox
        client.sendall(b"x" * 3 * echo.RECEIVE_SIZE)
        server.shutdown()
        server.serve_forever()
        assert same(read_all(client), lines)


def test_when_it_stops_a_client_that_still_sends_is_given_time_to_see_eof(server):
    with connect(server) as client:
        inside = only_client(server)
        server.stopping, inside.ending = True, "server stopping"
        inside.deadline = server._now + echo.TICK
        client.sendall(b"late")
        settle(server)
        assert inside.deadline > server._now + 1


def test_a_line_on_its_way_when_it_stops_does_not_cost_what_was_sent(server, monkeypatch):
    monkeypatch.setattr(echo, "TICK", 3)
    with connect(server) as client:
        client.sendall(b"hello\r\n" * 1000)
        settle(server)
        server.shutdown()
        thread = serve(server)
        with within(2):  # EOF comes at once, though the socket stays
            assert read_all(client) == b"hello\r\n" * 1000
        for _ in range(2):
            client.sendall(b"one more\r\n")  # after a reset, the second one would fail
    join(thread)


def test_when_it_stops_who_has_not_hung_up_is_given_a_moment_to(server, monkeypatch):
    monkeypatch.setattr(echo, "TICK", 0.5)
    turn = server._run_once

    def turn_with_a_look_at_the_deadlines(timeout):
        server._next_check = 0
        turn(timeout)

    monkeypatch.setattr(server, "_run_once", turn_with_a_look_at_the_deadlines)
    with connect(server) as quick, connect(server):
        settle(server)
        started = time.monotonic()
        server.shutdown()
        thread = serve(server)
        assert read_all(quick) == b""
        quick.close()
        join(thread)
        assert time.monotonic() - started >= 0.5


def test_stopping_leaves_the_reason_of_who_was_being_ended_already(
    strict_server, monkeypatch, caplog
):
    monkeypatch.setattr(echo, "LINGER", 0.3)
    caplog.set_level(logging.INFO, "echo")
    with connect(strict_server) as client:
        client.sendall(b"x" * 11)
        settle(strict_server)
        strict_server.shutdown()
        strict_server.serve_forever()
    assert " disconnected: line longer than 10 bytes, " in caplog.messages[-1]


def test_stopping_is_not_stopped_by_a_client_that_has_just_gone(server, monkeypatch):
    break_method(monkeypatch, "shutdown", errno.ENOTCONN)
    with connect(server):
        settle(server)
        server.shutdown()
        server.serve_forever()
        assert not server._clients


def test_a_second_signal_ends_it_at_once(run):
    script = run("0")
    with connect(script.addresses[0]) as client:
        flood(client)
        script.process.send_signal(signal.SIGTERM)
        wait_until_refused(script.addresses[0])
        with within(3):
            status, _, err = script.stop()
        assert (status, err) == (0, b"")


def test_signals_may_come_at_any_time(run):
    script = run("0", "-q")
    while script.process.poll() is None:
        script.process.send_signal(signal.SIGTERM)
    assert script.process.returncode == 0
    assert script.process.stderr.read() == b""


@pytest.mark.skipif(os.name != "posix", reason="background jobs are a POSIX shell's")
def test_a_background_job_where_sigint_comes_ignored_can_be_interrupted(run):
    script = run("0", command=["sh", "-c", 'trap "" INT; exec "$0" "$@"', sys.executable, SCRIPT])
    assert script.stop(signal.SIGINT)[::2] == (0, b"")


@pytest.mark.skipif(
    not shutil.which("unshare") or getattr(os, "geteuid", lambda: 1)() != 0,
    reason="needs root and unshare",
)
def test_as_pid_1_it_can_be_terminated(run):
    unshare = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, SCRIPT]
    script = run("0", command=unshare)
    with open(f"/proc/{script.process.pid}/task/{script.process.pid}/children") as children:
        os.kill(int(children.read()), signal.SIGTERM)
    assert script.process.wait(PATIENCE) == 0


def test_it_can_be_started_again_at_once_on_the_same_port(run):
    script = run("0")
    with connect(script.addresses[0]) as client:
        assert ask(client)
        assert script.stop()[0] == 0
        again = run(str(script.addresses[0][1]))
        with connect(again.addresses[0]) as other:
            assert ask(other)


# The log


def test_each_connection_is_logged_when_it_comes_and_when_it_leaves(run):
    script = run("0")
    with connect(script.addresses[0]) as client:
        me = echo.endpoint(client.getsockname())
        assert script.line() == f"{me} connected"
        assert ask(client, b"hello\r\n")
        client.sendall(b"hello\r\nhel")
        client.shutdown(socket.SHUT_WR)
        assert script.line() == f"{me} disconnected: closed by client, 14 bytes echoed, 3 dropped"


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EPIPE])
def test_what_could_not_be_sent_counts_as_dropped(server, number, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "echo")
    break_method(monkeypatch, "send", number)
    with connect(server) as client:
        server._run_once(1)
        client.sendall(b"hello\r\nhel")
        server._run_once(1)
        server.close()
    assert caplog.messages[-1].endswith(" 0 bytes echoed, 10 dropped")


def test_quiet_prints_the_ready_lines_only(run):
    script = run("0", "-q")
    with connect(script.addresses[0]) as client:
        assert ask(client, b"a\r\n")
    assert script.stop() == (0, [], b"")


def test_verbose_prints_each_line_as_printable_ascii_and_cut_short(run):
    nasty = b"\0\x1b[2J\n127.0.0.1:1 connected\r\x7f\xff\xc3\xa9"
    script = run("0", "-v")
    with connect(script.addresses[0]) as client:
        assert ask(client, nasty + b"\r\n" + b"y" * 500 + b"\r\n" + b"z" * echo.SHOWN + b"\r\n")
    _, lines, _ = script.stop()
    assert all(32 <= ord(c) < 127 for line in lines for c in line)
    shown = [line.partition(" ")[2] for line in lines[1:-1]]
    assert shown == [repr(nasty), f"b'{'y' * echo.SHOWN}'...", f"b'{'z' * echo.SHOWN}'"]


def test_verbose_counts_what_it_does_not_show_of_very_many_lines(server, caplog):
    caplog.set_level(logging.DEBUG, "echo")
    with connect(server) as client:
        client.sendall(b"a\r\n" * (echo.SHOWN + 5))
        settle(server)
    assert sum(text.endswith(" b'a'") for text in caplog.messages) == echo.SHOWN
    assert caplog.messages[-1].endswith(" and more lines: 5")
    assert {record.levelno for record in caplog.records[-2:]} == {logging.DEBUG}


def test_the_log_is_ascii_in_whatever_language_the_system_names_an_error(monkeypatch, tmp_path):
    with open(tmp_path / "log", "wb") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        echo.LogHandler().emit(logging.makeLogRecord({"msg": "zu gro\xdf"}))
    assert (tmp_path / "log").read_bytes() == b"zu gro\\xdf\n"


def test_a_log_pipe_that_nobody_reads_stops_nobody(run):
    script = run("0")
    for _ in range(1500):  # about 100 bytes of log each: more than a pipe holds
        with connect(script.addresses[0]) as client:
            assert ask(client)
    script.process.stdout.close()
    with connect(script.addresses[0]) as client:
        assert ask(client)
    script.process.stdout = None
    assert script.stop() == (0, [], b"")


def test_the_log_leaves_the_pipe_blocking_as_it_was():
    fcntl = pytest.importorskip("fcntl")
    receiver, sender = os.pipe()
    try:
        script = Script("0", ready=0, stdout=sender)
        with script.process:
            os.read(receiver, 1)
            assert not fcntl.fcntl(sender, fcntl.F_GETFL) & os.O_NONBLOCK
            assert script.stop()[0] == 0
    finally:
        os.close(receiver)
        os.close(sender)


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_terminal_that_nobody_reads_stops_nobody(run):
    terminal, stdout = os.openpty()
    try:
        script = run("-b", "127.0.0.1", "0", ready=0, stdout=stdout)
        ready = b""
        while b"\n" not in ready:
            ready += os.read(terminal, 1000)
        port = int(ready.split()[-1].rpartition(b":")[2])
        for _ in range(500):
            with connect(("127.0.0.1", port)) as client:
                assert ask(client)
        assert script.stop()[::2] == (0, b"")
        assert os.get_blocking(stdout)
    finally:
        os.close(terminal)
        os.close(stdout)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full and a POSIX shell")
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", "2>&-", ">&- 2>&- <&-"])
def test_without_a_usable_stdout_it_serves_on_and_the_log_goes_nowhere(run, redirection):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = f'exec "$0" "$1" -v -b 127.0.0.1 {port} {redirection}'
    script = run(ready=0, command=["sh", "-c", command, sys.executable, SCRIPT])
    with connect_when_ready(("127.0.0.1", port)) as client:
        assert ask(client)
        assert ask(client)
        assert script.stop()[::2] == (0, b"")
        assert read_all(client) == b""


# The command line


def test_by_default_it_listens_on_both_loopbacks_on_port_12321(run):
    if not all(can_listen(host, 12321) for host in LOOPBACKS):
        pytest.skip("port 12321 is taken")
    script = run()
    assert script.ready == [f"listening on {echo.endpoint((host, 12321))}" for host in LOOPBACKS]
    for address in script.addresses:
        with connect(address) as client:
            assert ask(client)


@needs_ipv6
def test_port_0_is_the_same_free_port_on_both_loopbacks(run):
    (_, port), (_, other) = run("0").addresses
    assert port == other != 0


@needs_ipv6
def test_port_0_tries_again_if_the_port_is_taken_on_the_other_loopback(monkeypatch):
    create_server_that_fails(monkeypatch, errno.EADDRINUSE, socket.AF_INET6)
    with echo.EchoServer(0) as server:
        assert len({port for _, port in server.addresses}) == 1
        assert len(server.addresses) == 2


def test_port_0_does_not_try_for_ever(monkeypatch):
    create_server_that_fails(monkeypatch, errno.EADDRINUSE, socket.AF_INET6, 1000)
    with pytest.raises(OSError, match="cannot listen on"):
        echo.EchoServer(0)


@needs_127_0_0_2
def test_bind_may_be_repeated_and_takes_names(run):
    script = run("-b", "127.0.0.2", "--bind", "localhost", "0", ready=2)
    assert [host for host, _ in script.addresses] == ["127.0.0.2", "127.0.0.1"]


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_without_ipv6_it_serves_127_0_0_1_unless_ipv6_was_asked_for(number, monkeypatch):
    create_server_that_fails(monkeypatch, number, socket.AF_INET6, 2)
    with echo.EchoServer(0) as server:
        assert [host for host, _ in server.addresses] == ["127.0.0.1"]
    with pytest.raises(OSError, match=r"cannot listen on \[::1\]:\d+: no"):
        echo.EchoServer(0, ["127.0.0.1", "::1"])


def test_without_any_loopback_it_does_not_start(monkeypatch):
    create_server_that_fails(monkeypatch, errno.EADDRNOTAVAIL, socket.AF_INET)
    with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:0: no"):
        echo.EchoServer(0)


@needs_127_0_0_2
def test_a_start_that_fails_leaves_nothing_open():
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=r"127\.0\.0\.2") as kept:  # its frames keep all alive
            echo.EchoServer(port, ["127.0.0.1", "127.0.0.2"])
        socket.create_server(("127.0.0.1", port)).close()
    assert kept


@needs_127_0_0_2
def test_a_port_in_use_is_named_with_status_1():
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        status, out, err = run_to_end("-b", "127.0.0.2", str(port))
    assert (status, out) == (1, "")
    assert err == f"echo.py: cannot listen on 127.0.0.2:{port}: {os.strerror(errno.EADDRINUSE)}\n"


def test_a_name_that_stands_for_nothing_is_named_with_status_1(call):
    status, out, err = call("-b", "nothing.invalid", "0")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"echo.py: cannot listen on nothing.invalid:0: [^\n]+\n", err)


@pytest.mark.parametrize(
    "arguments",
    [["x"], ["-1"], ["65536"], ["--max-line", "0"], ["--max-clients", "0"], ["--max-clients", "x"],
     ["--idle-timeout", "0"], ["--idle-timeout", "nan"], ["-q", "-v"], ["--nonsense"]],
)  # fmt: skip
def test_a_bad_argument_is_explained_with_status_2(call, arguments):
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"usage: (.*\n)+echo.py: error: .+\n", err)


def test_a_name_that_cannot_be_encoded_is_explained_with_status_2():
    status, out, err = run_to_end("-b", "\udcff")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"usage: (.*\n)+echo.py: error: .+\n", err)


@pytest.mark.parametrize(
    ("arguments", "sent", "expected"),
    [(["--lf"], b"a\nb", b"a\n"), (["--max-line", "3"], b"abc\r\nabcd\r\n", b"abc\r\n"),
     (["--idle-timeout", "0.5"], b"a\r\nb", b"a\r\n")],
)  # fmt: skip
def test_options_reach_the_server(run, arguments, sent, expected):
    with connect(run("0", *arguments).addresses[0]) as client:
        client.sendall(sent)
        if "--lf" in arguments:
            client.shutdown(socket.SHUT_WR)
        assert read_all(client) == expected


def test_max_clients_reaches_the_server(run):
    script = run("0", "--max-clients", "1")
    with connect(script.addresses[0]) as first:
        assert ask(first)
        with connect(script.addresses[-1]) as waiting:
            assert ask(first)  # in the same turn or a later one than `waiting` could come in
            first.close()
            assert ask(waiting)
    events = [script.line().split()[1] for _ in range(3)]
    assert events == ["connected", "disconnected:", "connected"]


def test_version_and_help_are_printed_with_status_0(call):
    assert call("--version") == (0, f"echo.py {echo.__version__}\n", "")
    status, out, err = call("-h")
    assert (status, err) == (0, "")
    assert all(option in out for option in ("--bind", "--lf", "--max-line", "-q", "-v"))
    assert all(default in out for default in ("12321", "1048576", "1000"))


@pytest.mark.parametrize("signals", [1, 2])
def test_main_ends_after_the_first_signal_and_at_once_on_the_second(monkeypatch, signals):
    """The same as tests above see from outside, where coverage can see it."""
    receiver, sender = os.pipe()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def play():
        """Have a line echoed, stall, and send one signal or two."""
        ready = out.readline().decode()
        with connect(("127.0.0.1", int(ready.rpartition(":")[2]))) as client:
            assert ask(client)
            flood(client)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until_refused(client.getpeername())
            if signals == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    with open(receiver, "rb") as out, open(sender, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(os, "_exit", sys.exit)
        monkeypatch.setattr(sys, "argv", ["echo.py", "-v", "-b", "127.0.0.1", "0"])
        player = threading.Thread(target=play)
        player.start()
        try:
            with pytest.raises(SystemExit) if signals == 2 else contextlib.nullcontext() as exit:
                echo.main()
            assert signals == 2 or signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        finally:
            join(player)
            for number, handler in before.items():
                signal.signal(number, handler)
            echo.log.handlers.clear()
            echo.log.setLevel(logging.NOTSET)
        assert signals == 1 or not exit.value.code
        assert b"are you there" in out.read1(4096)


# As a module


def test_import_starts_nothing_and_installs_no_handler():
    code = """
import logging, signal, threading
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
import echo
assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
assert not logging.getLogger("echo").handlers
assert not logging.root.handlers
assert threading.active_count() == 1
"""
    where = {"cwd": os.path.dirname(SCRIPT), "capture_output": True, "timeout": PATIENCE}
    done = subprocess.run([sys.executable, "-c", code], **where)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_shutdown_may_be_called_before_during_and_after_any_number_of_times(start):
    server = start()
    with connect(server) as client:
        assert ask(client)
        for _ in range(3):
            server.shutdown()
        join(server.thread)
        server.shutdown()
    with echo.EchoServer(0) as early:
        for _ in range(100000):
            early.shutdown()
        early.serve_forever()


def test_shutdown_wakes_a_server_that_waits(monkeypatch):
    monkeypatch.setattr(echo, "TICK", PATIENCE)
    with echo.EchoServer(0, ["127.0.0.1"]) as server:
        waiting, select = threading.Event(), server._selector.select
        monkeypatch.setattr(server._selector, "select", lambda t: waiting.set() or select(t))
        thread = serve(server)
        waiting.wait(PATIENCE)
        with within(PATIENCE / 2):
            server.shutdown()
            thread.join(2 * PATIENCE)


def test_close_closes_everything_and_may_be_called_again(caplog):
    caplog.set_level(logging.INFO, "echo")
    server = echo.EchoServer(0)
    with connect(server) as client:
        settle(server)
        server.close()
        assert client.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            connect(server)
    assert " disconnected: server closed, " in caplog.messages[-1]
    assert server._selector.get_map() is None
    server.close()
    server.shutdown()


def test_leaving_the_context_closes():
    with echo.EchoServer(0) as server:
        pass
    with pytest.raises(ConnectionRefusedError):
        connect(server)


@pytest.mark.parametrize(
    "options",
    [{"port": -1}, {"port": 65536}, {"max_line": 0}, {"max_clients": 0}, {"idle_timeout": 0},
     {"idle_timeout": math.nan}],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"^the port must be 0 to 65535, .* above 0$"):
        echo.EchoServer(**options)


def test_the_least_and_the_largest_numbers_are_taken():
    echo.EchoServer(0, ["127.0.0.1"], max_line=1, max_clients=1, idle_timeout=1e-9).close()
    with contextlib.suppress(OSError):  # if that port is taken
        echo.EchoServer(65535, ["127.0.0.1"]).close()


def test_no_resource_is_left_to_the_garbage_collector(run):
    script = run("0", command=[sys.executable, "-X", "dev", "-W", "error", SCRIPT])
    with connect(script.addresses[0]) as client:
        assert ask(client)
        assert script.stop()[::2] == (0, b"")


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_the_recipe_for_a_ci_job_in_the_readme_works(tmp_path):
    with open(os.path.join(os.path.dirname(SCRIPT), "README.md")) as readme:
        (recipe,) = re.findall(r"^```sh\n(set -e\nmkfifo .*?)^```$", readme.read(), re.M | re.S)
    os.symlink(sys.executable, tmp_path / "python3")
    os.symlink(SCRIPT, tmp_path / "echo.py")
    options = {"cwd": tmp_path, "capture_output": True, "timeout": PATIENCE}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["sh", "-c", recipe], env={**os.environ, "PATH": path}, **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"b'hello\\r\\n'\n", b"")


def test_the_fixture_for_a_python_test_in_the_readme_works(tmp_path):
    with open(os.path.join(os.path.dirname(SCRIPT), "README.md")) as readme:
        (fixture,) = re.findall(r"^```python\n(.*?)^```$", readme.read(), re.M | re.S)
    test = "def test(echo_address):\n    socket.create_connection(echo_address, 5).close()\n"
    (tmp_path / "test_it.py").write_text(f"import socket\n{fixture}\n\n{test}")
    where = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": os.path.dirname(SCRIPT)}}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, timeout=3 * PATIENCE, **where)
    assert b"1 passed" in done.stdout
