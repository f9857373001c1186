"""What echo.py promises, as a specification that runs.

Part one says what is promised, over real sockets. In part two, a simulated kernel
answers in every way it may. Part three is the command line, the log and the module.
"""

import contextlib
import errno
import functools
import io
import itertools
import logging
import os
import random
import re
import select
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
FOLDER = os.path.dirname(SCRIPT)
PATIENCE = 10  # seconds that a socket, a process or a thread may take
LINE = b"x" * 1022 + b"\r\n"
FLOOD = memoryview(LINE * (1 << 16))  # 64 MiB: more than the kernel holds for anybody
BUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}


def can_listen(host, port=0):
    with contextlib.suppress(OSError):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
        return True
    return False


def needs(condition, reason):
    return pytest.mark.skipif(not condition, reason=reason)


LOOPBACKS = [host for host in ("127.0.0.1", "::1") if can_listen(host)]
needs_ipv6 = needs("::1" in LOOPBACKS, "no IPv6 here")
needs_signals = needs(os.name != "nt", "a signal from outside ends a Windows process")
needs_linux = needs(sys.platform == "linux", "only Linux tells, in /proc or TCP_INFO")


def connect(server):
    """Connect to an address, or to the first one of a server or a script."""
    address = server if isinstance(server, tuple) else server.addresses[0]
    sock = socket.create_connection(address, timeout=PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


@contextlib.contextmanager
def connected(server, size):
    """Connect so many clients."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(server)) for _ in range(size)]


def refused(address):
    with socket.socket() as sock:
        sock.settimeout(PATIENCE)
        return sock.connect_ex(address) == errno.ECONNREFUSED


def read_all(sock):
    """Return all that comes until EOF."""
    return b"".join(iter(lambda: sock.recv(1 << 20), b""))


def read(sock, count):
    """Return the next `count` bytes, or fewer if EOF comes first."""
    data = bytearray()
    while len(data) < count and (chunk := sock.recv(count - len(data))):
        data += chunk
    return bytes(data)


def ask(sock, line=b"are you there?\r\n"):
    """Tell whether a line comes back."""
    sock.sendall(line)
    return read(sock, len(line)) == line


def is_silent(sock):
    """Tell if nothing comes for a while, not even EOF."""
    return not select.select([sock], [], [], 0.1)[0]


def same(got, expected):
    """Compare. If large bytes differ, pytest would explain it for minutes."""
    return got == expected


def flood(sock, pause=0.2):
    """Send lines, read nothing, until no more is taken. Return what was taken."""
    sock.settimeout(pause)
    sent = 0
    with contextlib.suppress(socket.timeout):
        while sent < len(FLOOD):
            sent += sock.send(FLOOD[sent : sent + (1 << 16)])
    sock.settimeout(PATIENCE)
    assert sent < len(FLOOD), "nothing made it wait"
    return bytes(FLOOD[:sent])


def reset(sock):
    linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    sock.close()


@contextlib.contextmanager
def takes(at_least, at_most):
    """Check how many seconds a block takes."""
    started = time.monotonic()
    yield
    assert at_least <= time.monotonic() - started < at_most


def eventually(condition):
    """Wait until something that cannot be waited for is true."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


@pytest.fixture
def start(caplog):
    """Start servers that run in threads, and stop them."""
    caplog.set_level(logging.INFO, "echo")
    with contextlib.ExitStack() as stack:

        def start(hosts="127.0.0.1", **options):
            server = stack.enter_context(echo.EchoServer(0, hosts, **options))
            server.thread = threading.Thread(target=server.serve_forever)
            server.thread.start()
            stack.callback(server.thread.join, PATIENCE)
            stack.callback(server.close)
            return server

        yield start


class Script:
    """echo.py as a process; `addresses` are those of its ready lines."""

    def __init__(self, stack, *arguments, ready=True, prefix=(), **options):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        python = (sys.executable, "-X", "dev", "-W", "error")
        few = ("--max-clients", "100")  # Few descriptors will do, without a warning.
        command = [*prefix, *python, SCRIPT, *few, *arguments]
        self.process = subprocess.Popen(command, env=BUFFERED, **options)
        stack.enter_context(self.process)
        stack.callback(self.process.kill)
        hosts = (["-b"] if "-b" in arguments else LOOPBACKS) if ready else []
        lines = [self.line() for _ in hosts]
        ready_line = r"listening on \[?(.*?)\]?:(\d+)"
        found = [re.fullmatch(ready_line, line) for line in lines]
        assert all(found), (lines, self.stop())
        self.addresses = [(match[1], int(match[2])) for match in found]

    def line(self):
        return self.process.stdout.readline().decode("ascii").rstrip("\r\n")

    def stop(self, number=signal.SIGTERM):
        """Send a signal; return the status, the rest of stdout, and stderr."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, (out or b"").decode("ascii").splitlines(), err


@pytest.fixture
def run():
    """Start the script; kill what is left of it at the end."""
    with contextlib.ExitStack() as stack:
        yield functools.partial(Script, stack)


# PART ONE: WHAT IS PROMISED. First, lines.


def test_a_line_comes_back_as_soon_as_it_is_complete_and_no_part_of_one_before(start):
    with connect(start()) as client:
        client.sendall(b"hel")
        assert is_silent(client)
        client.sendall(b"lo\r\nwor")
        assert client.recv(100) == b"hello\r\n"
        client.sendall(b"ld\r\n\r\n")
        assert read(client, 9) == b"world\r\n\r\n"


@functools.lru_cache(maxsize=1 << 12)
def rule(stream, terminator=b"\r\n", max_line=1 << 20):
    """The contract: what a client that sends this stream and half-closes reads."""
    lines = stream.split(terminator)[:-1]
    fitting = itertools.takewhile(lambda line: len(line) <= max_line, lines)
    return b"".join(line + terminator for line in fitting)


def all_streams(longest):
    """Return every stream of CR, LF and one letter up to this length."""
    lengths = range(longest + 1)
    return [bytes(s) for n in lengths for s in itertools.product(b"\r\nx", repeat=n)]


def cuts(stream):
    """Yield every way to cut the stream into pieces."""
    for places in itertools.product((False, True), repeat=max(len(stream) - 1, 0)):
        edges = [0, *(i + 1 for i, cut in enumerate(places) if cut), len(stream)]
        yield [stream[a:b] for a, b in zip(edges, edges[1:]) if a < b]


def framed(pieces, terminator=b"\r\n", max_line=1 << 20):
    """Return the lines that these pieces complete, and what is left."""
    inbox, echoed, longest = bytearray(), b"", max_line + len(terminator)
    for piece in pieces:
        while piece and len(inbox) < longest:  # As the server reads: see _receive().
            room = longest - len(inbox)
            chunk, piece = memoryview(piece[:room]), piece[room:]
            lines, inbox = echo.take_lines(inbox, chunk, terminator)
            echoed += lines
    return echoed, inbox


@pytest.mark.parametrize("terminator", [b"\r\n", b"\n"])
@pytest.mark.parametrize("max_line", [1, 3, 1 << 20])
def test_lines_come_back_exactly_however_the_stream_is_cut(terminator, max_line):
    for stream in all_streams(6):
        lines = rule(stream, terminator, max_line)
        too_long = len(stream) - len(lines) >= max_line + len(terminator)
        for pieces in cuts(stream):
            echoed, rest = framed(pieces, terminator, max_line)
            assert echoed == lines
            assert (len(rest) == max_line + len(terminator)) == too_long
            assert too_long or echoed + rest == stream


def test_a_long_line_in_small_pieces_is_searched_once():
    pieces = [*[b"\n" + b"x" * 63] * (1 << 15), b"\r\n"]  # 2 MiB
    before = time.process_time()
    echoed, rest = framed(pieces, max_line=1 << 30)
    assert time.process_time() - before < 3  # seconds; several times that if repeated
    assert (echoed, rest) == (b"".join(pieces), b"")


def test_an_urgent_byte_comes_back_in_its_place(start):
    with connect(start()) as client:
        client.sendall(b"hel")
        client.send(b"X", socket.MSG_OOB)
        client.sendall(b"lo\r\n")
        assert read(client, 8) == b"helXlo\r\n"


def hints(caplog):
    return [r for r in caplog.records if "sent LF alone" in r.message]


def test_bare_lf_is_explained_once_per_connection_by_a_warning(start, caplog):
    server = start()
    with connect(server) as one, connect(server) as other:
        one.sendall(b"\n")
        eventually(lambda: len(hints(caplog)) == 1)
        one.sendall(b"a\n")
        other.sendall(b"a\nb\r\nc")
        assert read(other, 5) == b"a\nb\r\n"
        assert is_silent(one)
        assert len(hints(caplog)) == 1
        other.sendall(b"d\n")
        eventually(lambda: len(hints(caplog)) == 2)
    assert {r.levelno for r in hints(caplog)} == {logging.WARNING}
    assert len(hints(caplog)) == len({r.message for r in hints(caplog)}) == 2
    assert hints(caplog)[0].message.endswith(": use nc -C (macOS: nc -c), or --lf")


# Clients


def test_many_clients_in_halves_get_each_its_own(start):
    with connected(start(), 100) as clients:
        for client in clients:
            client.sendall(b"I am num")
        for i, client in enumerate(clients):
            client.sendall(b"ber %d\r\n" % i)
        for i, client in enumerate(clients):
            expected = b"I am number %d\r\n" % i
            assert read(client, len(expected)) == expected


def test_a_client_that_does_not_read_is_not_read_from(start):
    server = start()
    with connect(server) as stalled, connect(server) as other:
        flood(stalled)
        with takes(0, 1):
            assert ask(other)


@pytest.mark.parametrize("name", ["Default", "Poll", "Select"])
def test_who_half_closes_and_reads_late_gets_every_byte(start, name, monkeypatch):
    selector = getattr(selectors, f"{name}Selector", None)
    if not selector:
        pytest.skip(f"this platform has no {name}Selector")
    monkeypatch.setattr(selectors, "DefaultSelector", selector)
    with connect(start()) as client:
        sent = flood(client)
        client.shutdown(socket.SHUT_WR)
        assert same(read_all(client), rule(sent))


def is_asleep(pid, seconds):
    """Tell if a process neither wakes up nor uses CPU time for so long."""
    before = wake_ups_and_cpu(pid)
    time.sleep(seconds)
    return wake_ups_and_cpu(pid) == before


def wake_ups_and_cpu(pid):
    """Return how often a process has gone to sleep, and its CPU time in clock ticks."""
    with open(f"/proc/{pid}/status") as status, open(f"/proc/{pid}/stat") as stat:
        switches = re.search(r"^voluntary_ctxt_switches:\s*(\d+)", status.read(), re.M)
        fields = stat.read().rpartition(")")[2].split()
    return int(switches[1]), int(fields[11]) + int(fields[12])


@needs_linux
def test_waiting_costs_no_system_call_and_no_cpu(run):
    script = run("0")
    with connected(script, 4) as (silent, half_line, stalled, half_closed):
        assert ask(silent)
        half_line.sendall(b"hel")
        flood(stalled)
        flood(half_closed)
        half_closed.shutdown(socket.SHUT_WR)
        eventually(lambda: is_asleep(script.process.pid, 0.5))  # All is served.
        assert is_asleep(script.process.pid, 0.5)


@pytest.mark.parametrize("state", ["mid-line", "owed"])
def test_a_reset_ends_that_client_alone(start, state, caplog):
    server = start()
    with connect(server) as other:
        victim = connect(server)
        assert ask(victim)
        victim.sendall(b"hel") if state == "mid-line" else flood(victim)
        reset(victim)
        eventually(lambda: " disconnected: " in caplog.messages[-1])
        assert ask(other)
    reason = "" if os.name == "nt" else os.strerror(errno.ECONNRESET)
    assert f" disconnected: {reason}" in " ".join(caplog.messages)


@needs_signals
def test_an_end_reaches_a_client_whose_socket_a_forked_child_has_too(start):
    server = start(idle_timeout=0.3)
    with connect(server) as client:
        assert ask(client)
        child = os.fork()
        if not child:
            signal.pause()
        try:
            assert read_all(client) == b""
            client.shutdown(socket.SHUT_WR)  # The child has this socket, too.
            server.shutdown()
            server.thread.join(PATIENCE)
            assert refused(server.addresses[0])
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_idle_clients_go_whatever_they_wait_for_and_a_busy_one_stays(start, caplog):
    server = start(idle_timeout=0.6, max_line=2000)
    with takes(0.6, 9), connected(server, 4) as (quiet, half, stalled, busy):
        half.sendall(b"hel")
        flood(stalled)
        while sum(": idle for 0.6 s, " in text for text in caplog.messages) < 3:
            assert ask(busy)
            with connect(server) as another:  # Its end does not put off the others'.
                assert not ask(another, b"x" * 2002)
        assert read_all(quiet) == read_all(half) == b""


@needs_signals
def test_a_server_that_was_stopped_looks_before_it_calls_a_client_idle(run):
    script = run("0", "--idle-timeout", "0.5")
    with connect(script) as client:
        assert ask(client)
        script.process.send_signal(signal.SIGSTOP)
        client.sendall(b"meanwhile\r\n")
        time.sleep(0.7)  # longer than the timeout
        script.process.send_signal(signal.SIGCONT)
        assert read(client, 11) == b"meanwhile\r\n"


def test_who_sends_or_reads_slowly_but_steadily_is_not_idle(start):
    line = b"x" * ((1 << 20) - 2) + b"\r\n"
    pieces = [line[i : i + (1 << 15)] for i in range(0, len(line), 1 << 15)]
    with connect(start(idle_timeout=0.8)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        for piece in pieces:
            client.sendall(piece)
            time.sleep(0.04)  # That is 1.3 s in all, and as much for the way back.
        for piece in pieces:
            time.sleep(0.04)
            assert same(read(client, len(piece)), piece)


OPTIONS = {  # of accepted sockets, as the system reports them
    "SO_KEEPALIVE": 1,
    "TCP_KEEPIDLE": 200,
    "TCP_KEEPINTVL": 75,
    "TCP_KEEPCNT": 3,
    "TCP_NODELAY": 1,
    "TCP_NOTSENT_LOWAT": 131072,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_accepted_sockets_have_their_options_from_the_listener(name):
    if not hasattr(socket, name):
        pytest.skip(f"this system has no {name}")
    (listener,) = echo.listen(0, "127.0.0.1")
    with listener, connect(listener.getsockname()):
        listener.setblocking(True)
        with listener.accept()[0] as sock:
            level = socket.SOL_SOCKET if name[:3] == "SO_" else socket.IPPROTO_TCP
            value = sock.getsockopt(level, getattr(socket, name))
            assert value in (OPTIONS[name], 4 * OPTIONS[name])  # macOS counts so


# Limits


def test_a_line_may_have_one_mib_and_a_longer_one_is_the_end(start):
    with connect(start()) as client:
        assert ask(client, b"x" * (1 << 20) + b"\r\n")
        client.sendall(b"a\r\n" + b"x" * ((1 << 20) + 2))
        assert read_all(client) == b"a\r\n"


def test_a_client_that_goes_on_sending_after_the_end_reads_all_it_is_owed(
    start, monkeypatch, caplog
):
    monkeypatch.setattr(echo.EchoServer, "LINGER", 1.0)
    lines = LINE * 400  # more than its kernel takes: a reset would destroy the rest
    server = start(max_line=2000)
    with connect(server) as client, takes(0, 8):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.sendall(lines + b"x" * 2002)
        got = b""
        while chunk := client.recv(1 << 13):
            got += chunk
            client.sendall(b"late")
        assert same(got, lines)
        server.shutdown()  # The first reason stays.
        with pytest.raises(ConnectionError):
            while True:
                client.sendall(b"x" * 1000)
    reason = ": line longer than 2000 bytes, 409600 bytes"
    eventually(lambda: reason in caplog.messages[-1])


def test_client_n_plus_one_waits_and_is_served_when_one_leaves(start, caplog):
    server = start(max_clients=2)
    with connect(server) as first, connect(server) as second, connect(server) as third:
        third.sendall(b"hello\r\n")
        assert ask(first) and ask(second)
        assert sum("connected" in text.split()[1] for text in caplog.messages) == 2
        first.close()
        assert read(third, 7) == b"hello\r\n"


def test_select_is_not_given_more_sockets_than_it_can_watch(monkeypatch):
    monkeypatch.setattr(selectors, "DefaultSelector", selectors.SelectSelector)
    for limits, expected in ({}, 500), ({"max_clients": 10}, 10):
        with echo.EchoServer(0, **limits) as server:
            assert server.max_clients == expected


@needs_signals
def test_the_soft_limit_of_descriptors_is_raised(run):
    shell = ("sh", "-c", 'ulimit -S -n 40; exec "$@"', "sh")
    script = run("-b", "127.0.0.1", "0", "--max-clients", "60", prefix=shell)
    with connected(script, 60) as clients:
        assert all(map(ask, clients))


@needs_signals
def test_out_of_descriptors_accepting_rests_and_the_others_are_served(run):
    shell = ("sh", "-c", 'ulimit -n 40; exec "$@"', "sh")
    script = run("-q", "0", "--max-clients", "60", prefix=shell)
    assert script.line() == (
        "only 40 descriptors for 60 clients: "
        "raise the limit (ulimit -n), or lower --max-clients"
    )
    with takes(1, 4), connected(script, 60) as clients:
        reason = os.strerror(errno.EMFILE)
        assert script.line() == f"cannot accept: {reason}; next try in 1 s"
        assert ask(clients[0])
        for client in clients[:30]:
            client.close()
        assert ask(clients[-1])
    assert script.stop() == (0, [], b"")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOSYS])
def test_an_error_of_accept_that_is_not_known_to_pass_begins_a_pause(
    start, number, monkeypatch, caplog
):
    def accept(_):
        calls.append(time.monotonic())
        raise OSError(number, "refused")

    calls = []
    monkeypatch.setattr(socket.socket, "accept", accept)
    with connect(start()):
        eventually(lambda: len(calls) == 3)
    assert calls[2] - calls[0] > 1.9  # seconds
    assert caplog.messages.count("cannot accept: refused; next try in 1 s") >= 2


def test_an_error_of_accept_that_is_known_to_pass_delays_nobody(start, monkeypatch):
    failures = [ConnectionAbortedError(errno.ECONNABORTED, "gone")] * 3
    real = socket.socket.accept

    def accept(sock):
        if failures:
            raise failures.pop()
        return real(sock)

    monkeypatch.setattr(socket.socket, "accept", accept)
    with takes(0, 0.9), connect(start()) as client:
        assert ask(client)
    assert not failures


def test_a_line_that_is_too_long_ends_with_eof_however_much_follows(start):
    with connect(start(max_line=10)) as client:
        client.sendall(b"x" * 40)
        assert read_all(client) == b""
        client.sendall(b"more")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""


# Stopping


@needs_signals
def test_a_full_server_that_is_stopped_ends_as_any_other(run):
    script = run("0", "-q", "--max-clients", "1")
    with connect(script) as client:
        assert ask(client)
        assert script.stop() == (0, [], b"")


@needs_signals
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_status_0_though_clients_sit_idle(run, number):
    script = run("0")
    with connect(script.addresses[0]) as client, connect(script.addresses[-1]) as half:
        half.sendall(b"hel")
        assert ask(client)
        with takes(0.5, 1):  # a moment to hang up, and no more
            status, lines, err = script.stop(number)
        assert (status, err) == (0, b"")
        assert read_all(client) == read_all(half) == b""
    assert sum(" disconnected: server stopping, " in line for line in lines) == 2


@needs_signals
def test_those_who_came_before_the_stop_are_answered(run):
    script = run("0")
    script.process.send_signal(signal.SIGSTOP)
    with connected(script, 50) as clients:
        for client in clients:
            client.sendall(b"hello\r\n")
        script.process.send_signal(signal.SIGTERM)
        script.process.send_signal(signal.SIGCONT)
        for client in clients:
            assert read_all(client) == b"hello\r\n"
            client.close()
    assert script.stop()[0] == 0


def test_stopping_waits_no_longer_than_promised_and_says_so(start, monkeypatch, caplog):
    monkeypatch.setattr(echo.EchoServer, "LINGER", 0.3)
    server = start()
    with connect(server) as client:
        flood(client)
        with takes(0.3, 2):
            server.shutdown()
            server.thread.join(PATIENCE)
    (notice,) = [text for text in caplog.messages if text.startswith("stopping: ")]
    assert "clients left: 1, for 0.3 s at most; a second signal ends it" in notice


@needs_linux
def test_what_a_client_sends_after_the_stop_costs_it_nothing(start, caplog):
    server = start()
    with connect(server) as client:
        client.sendall(LINE * 300)
        assert read(client, len(LINE)) == LINE
        server.shutdown()
        eventually(lambda: refused(server.addresses[0]))
        client.sendall(b"late\r\n")
        time.sleep(1)  # longer than a silent client is given
        client.sendall(b"later\r\n")
        got = len(LINE) + len(read_all(client))
    server.thread.join(PATIENCE)
    assert f": server stopping, {got} bytes echoed, " in caplog.messages[-1]


@needs_signals
def test_a_second_signal_ends_it_at_once_but_not_within_a_second(run):
    script = run("0")
    with connect(script) as client:
        flood(client)
        with takes(0, 3):
            script.process.send_signal(signal.SIGTERM)
            script.process.send_signal(signal.SIGINT)
            time.sleep(1.1)  # longer than a wrapper takes to send a signal on
            assert script.process.poll() is None
            assert script.stop()[::2] == (0, b"")


@needs_signals
def test_signals_may_come_at_any_time(run):
    script = run("0", "-q")
    while script.process.poll() is None:
        script.process.send_signal(signal.SIGTERM)
    assert script.process.returncode == 0
    assert script.process.stderr.read() == b""


@needs_signals
def test_a_background_job_where_sigint_comes_ignored_can_be_interrupted(run):
    script = run("0", prefix=("sh", "-c", 'trap "" INT; exec "$@"', "sh"))
    assert script.stop(signal.SIGINT) == (0, [], b"")


@needs(shutil.which("unshare") and os.geteuid() == 0, "needs root and unshare")
def test_as_pid_1_it_can_be_terminated(run):
    script = run("0", prefix=("unshare", "--pid", "--fork", "--kill-child"))
    pid = script.process.pid
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        os.kill(int(children.read()), signal.SIGTERM)
    assert script.process.wait(PATIENCE) == 0


# Who reads the log


@needs_signals
def test_a_log_pipe_that_nobody_reads_stops_nobody(run):
    script = run("-b", "127.0.0.1", "0")
    for _ in range(1200):  # about 100 bytes of log each: more than a pipe holds
        with connect(script) as client:
            assert ask(client)
    script.process.stdout.close()
    with connect(script) as client:
        assert ask(client)
    script.process.stdout = None
    assert script.stop() == (0, [], b"")


@needs_signals
def test_a_terminal_that_nobody_reads_stops_nobody_and_stays_as_it_was(run):
    terminal, stdout = os.openpty()
    with open(terminal, "rb", 0) as screen, open(stdout, "wb", 0):
        script = run("-b", "127.0.0.1", "0", ready=False, stdout=stdout)
        port = int(screen.readline().rpartition(b":")[2])
        for _ in range(300):
            with connect(("127.0.0.1", port)) as client:
                assert ask(client)
        assert os.get_blocking(stdout)
        assert script.stop()[::2] == (0, b"")


@needs_linux
@pytest.mark.parametrize("how", [">/dev/full", ">&-", "2>&-", ">&- 2>&- <&-"])
def test_without_a_usable_stdout_it_serves_on_and_the_log_goes_nowhere(run, how):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    shell = ("sh", "-c", f'exec "$@" {how}', "sh")
    script = run("-v", "-b", "127.0.0.1", str(address[1]), ready=False, prefix=shell)
    eventually(lambda: not refused(address))
    with connect(address) as client:
        assert ask(client)
        assert ask(client)
    assert script.stop()[::2] == (0, b"")


# The recipes of the README


def block(language, beginning=""):
    """Return the only block of code in the README that begins so."""
    with open(os.path.join(FOLDER, "README.md"), encoding="utf-8") as readme:
        blocks = rf"^```{language}\n({beginning}.*?)^```$"
        (text,) = re.findall(blocks, readme.read(), re.M | re.S)
    return text


def in_folder(folder, *command, **variables):
    """Run a command in a folder; return its status and what it printed."""
    options = {"capture_output": True, "timeout": 3 * PATIENCE, "cwd": folder}
    done = subprocess.run(command, env={**BUFFERED, **variables}, **options)
    return done.returncode, (done.stdout + done.stderr).decode()


@needs_signals
def test_the_recipe_for_a_ci_job_works_twice(tmp_path):
    os.symlink(sys.executable, tmp_path / "python3")
    os.symlink(SCRIPT, tmp_path / "echo.py")
    step = ("sh", "-c", block("sh", r"\(\n  set -e\n"))
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    for _ in range(2):
        assert in_folder(tmp_path, *step, PATH=path) == (0, "b'hello\\r\\n'\n")
        log = (tmp_path / "echo.log").read_text()
        assert " disconnected: closed by client, 7 bytes" in log
    (tmp_path / "echo.py").unlink()
    status, printed = in_folder(tmp_path, *step, PATH=path)
    assert status == 1
    assert "did not start" in printed


def test_the_pytest_fixture_works_twice(tmp_path):
    (tmp_path / "test_it.py").write_text(block("python"))
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    for _ in range(2):
        status, printed = in_folder(tmp_path, *command, PYTHONPATH=FOLDER)
        assert (status, "1 passed" in printed) == (0, True)


# PART TWO: EVERY SCHEDULE

# A real kernel mostly takes all that is sent, and hardly ever runs out of memory. This
# one does whatever a kernel may do: `Choices` decides what each call answers. Short
# streams get every combination of answers, depth first; long ones get some, in a random
# walk. Whenever the server waits, the rules are checked from outside.

AGAIN, RESET, NO_MEMORY = errno.EAGAIN, errno.ECONNRESET, errno.ENOMEM
SHORTAGES = (errno.EMFILE, NO_MEMORY, MemoryError, errno.EPERM, errno.EINVAL)
SURPRISES = (AGAIN, errno.ENOTCONN, errno.ECONNABORTED)  # harmless ones
TURNS = 3000  # more than any schedule here needs


def raise_error(error):
    raise error if error is MemoryError else OSError(error, os.strerror(error))


class Choices:
    """Decisions: numbers of options. What is not decided yet is drawn, or 0."""

    def __init__(self, decisions, draw=lambda common, rare: 0):
        self.decisions, self.draw = list(decisions), draw
        self.widths = []  # how many options there were, for each decision made

    def choose(self, common, rare):
        """Return the number of an option. The rare ones come last."""
        if len(self.widths) == len(self.decisions):
            self.decisions.append(self.draw(common, rare))
        self.widths.append(common + rare)
        return self.decisions[len(self.widths) - 1]

    def following(self):
        """Return the decisions that come next, depth first; after the last, nothing."""
        decisions = self.decisions[: len(self.widths)]
        while decisions and decisions[-1] + 1 == self.widths[len(decisions) - 1]:
            decisions.pop()
        return [*decisions[:-1], decisions[-1] + 1] if decisions else []


# ---- The simulated kernel ------------------------------------------------------------


class Kernel:
    """The time, the sockets, and the rules. `faults` and `stops` are budgets."""

    def __init__(self, streams, choices, faults=0, stops=0, hangs_up=True, **limits):
        self.choices, self.limits = choices, limits
        self.budget = faults, stops
        self.faults = self.stops = 0  # None while the server starts.
        self.hangs_up = hangs_up  # whether a client that has sent all ends its side
        self.max_line = limits.get("max_line", 1 << 20)
        self.max_clients = limits.get("max_clients", 1000)
        self.queue = list(enumerate(streams))  # who waits to be accepted
        self.accepted, self.sockets, self.selectors = [], [], []
        self.listener = Listener(self)
        self.told = set()  # sockets reported as ready, and not used since then
        self.wakes = 0  # bytes in the socket pair
        self.may_accept = 0  # how often in this turn, so that newcomers delay nobody
        self.log = []
        self.now, self.turn = 1000.0, 1
        self.stopped = None  # in which turn shutdown() was called
        self.early = False  # whether that was before all was done

    def run(self):
        log = logging.Logger("simulated", logging.INFO)
        log.handle = lambda record: self.log.append(record.getMessage())
        fakes = [
            (echo, "log", log),
            (socket, "create_server", lambda *_, **__: self.listener),
            (socket, "socketpair", lambda: (Wake(self), Wake(self))),
            (selectors, "DefaultSelector", lambda: Selector(self)),
            (time, "monotonic", lambda: self.now),
            # The same place in a set each time, so that a schedule can be replayed:
            (echo.Client, "__hash__", lambda c: int(c.name.rpartition(":")[2])),
            (socket, "getnameinfo", lambda address, _: address),
        ]
        with pytest.MonkeyPatch.context() as patch:
            for owner, name, fake in fakes:
                patch.setattr(owner, name, fake)
            self.server = echo.EchoServer(0, "127.0.0.1", **self.limits)
            self.faults, self.stops = self.budget
            self.server.serve_forever()
        self.check_turn()
        self.check_end()

    def decide(self, sock, options, *errors):
        """Return one of the options, or spend a fault; before that, perhaps stop."""
        errors = errors if self.faults else ()
        number = self.choices.choose(len(options), len(errors) + (self.stops > 0))
        if number < len(options):
            return options[number]
        number -= len(options)
        if number == len(errors):
            self.early = True
            self.stop()
            return self.decide(sock, options, *errors)
        self.faults -= 1
        sock.failed |= errors[number] not in SURPRISES
        return raise_error(errors[number])

    def stop(self):
        self.stopped, self.stops = self.turn, 0
        self.server.shutdown()

    def open(self):
        return [client for client in self.accepted if not client.closed]

    def full(self):
        return len(self.open()) >= self.max_clients

    def idle(self):
        """Nothing is left to come, and the server waits without end."""
        assert self.stopped is None, "it hangs, though it was told to stop"
        assert not any(c.unread for c in self.open()), "it hangs with bytes to read"
        assert self.full() or not self.queue, "it hangs with clients to accept"
        self.now += 60
        self.stop()

    def check_turn(self):
        """What holds whenever the server waits."""
        self.turn += 1
        assert self.turn < TURNS, "it is busy without end"
        assert all(s.closed for s in self.told), "somebody ready was left out"
        accepts = self.listener in self.selectors[-1].keys
        excused = self.listener.failed or self.stopped
        assert excused or accepts != self.full(), "newcomers wait, or too many come"
        for client in self.open():
            assert not client.failed, "a connection that has failed is open"
            key = self.selectors[-1].keys.get(client)
            assert key, "it does not wait for a client"
            wanted = selectors.EVENT_WRITE if client.owed() else selectors.EVENT_READ
            assert key.events == wanted, "it waits for the wrong event"
            too_long = client.is_too_long() and not client.owed()
            assert client.ended or not too_long, "too long a line ended nothing"

    def check_end(self):
        """What holds after serve_forever()."""
        assert self.stopped is not None, "it stopped by itself"
        assert all(s.closed for s in self.sockets + self.selectors), "left open"
        excused = self.faults < self.budget[0] or "max_clients" in self.limits
        assert excused or not self.queue, "who came before the stop was left out"
        for client in self.accepted:
            whole = client.sent == rule(client.stream, max_line=self.max_line)
            assert whole or client.failed or self.early, "not the whole answer"
        pattern = r":(\d+) disconnected: .*, (\d+) bytes echoed, (\d+) dropped\n"
        logged = re.findall(pattern, "\n".join(self.log) + "\n")
        real = [(c.port, len(c.sent), len(c.read) - len(c.sent)) for c in self.accepted]
        assert sorted(tuple(map(int, n)) for n in logged) == sorted(real), "wrong log"


class Socket(contextlib.AbstractContextManager):
    """What all simulated sockets have in common."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.blocking, self.closed, self.failed = True, False, False
        kernel.sockets.append(self)

    def setblocking(self, flag):
        self.blocking = flag

    def begin_call(self):
        """Return whether the selector has said that the socket is ready."""
        assert not self.closed and not self.blocking, "a closed or blocking socket"
        told = self in self.kernel.told
        self.kernel.told.discard(self)
        return told

    def shutdown(self, how):
        if self.closed:
            raise_error(errno.EBADF)
        self.kernel.decide(self, [None], errno.ENOTCONN)

    def close(self):
        registered = self in self.kernel.selectors[-1].keys
        assert not registered, "closed before it was unregistered"
        self.closed = True

    def __exit__(self, *_):
        self.close()


class Wake(Socket):
    """Either end of the socket pair."""

    def fileno(self):
        return 99

    def is_ready(self, event):
        return self.kernel.wakes > 0

    def send(self, data):
        self.begin_call()
        self.kernel.wakes += len(data)

    def recv(self, size):
        self.begin_call()
        self.kernel.wakes -= min(self.kernel.wakes, size)


class Listener(Socket):
    rest_until = 0

    def getsockname(self):
        return "127.0.0.1", 12321

    def is_ready(self, event):
        return bool(self.kernel.queue)

    def accept(self):
        self.begin_call()
        kernel = self.kernel
        kernel.may_accept -= 1
        assert kernel.may_accept >= 0 or kernel.stopped, "newcomers delay the others"
        assert kernel.now >= self.rest_until, "it does not rest after a shortage"
        assert not kernel.full(), "too many clients"
        if not kernel.queue:
            raise_error(AGAIN)
        kernel.decide(self, [None], AGAIN, errno.ECONNABORTED)
        self.rest_until = kernel.now + 1  # if this fails
        kernel.decide(self, [None], *SHORTAGES)
        self.rest_until = 0
        client = Connection(kernel, *kernel.queue.pop(0))
        kernel.accepted.append(client)
        return client, ("127.0.0.1", client.port)


class Connection(Socket):
    """The server's end of a connection, and what has gone through it."""

    def __init__(self, kernel, number, stream):
        super().__init__(kernel)
        self.port = 40000 + number
        self.stream = self.unread = stream
        self.read = self.sent = self.heard = b""  # heard: read before the server's EOF
        self.ended = 0.0  # when the server sent EOF; 0: it has not
        self.hung_up = False  # whether it has read EOF
        self.gone = False  # whether the next read fails

    def owed(self):
        return rule(self.heard, max_line=self.kernel.max_line)[len(self.sent) :]

    def is_too_long(self):
        """Tell if so much of a line was read that it is too long, whatever follows."""
        rest = len(self.heard) - len(rule(self.heard, max_line=self.kernel.max_line))
        return rest >= self.kernel.max_line + len(b"\r\n")

    def is_ready(self, event):
        can_read = self.unread or self.kernel.hangs_up or self.gone
        return event == selectors.EVENT_WRITE or bool(can_read)

    def recv_into(self, buffer):
        assert self.begin_call(), "it reads twice, or from who is not ready"
        assert not self.owed(), "it reads from a client that it owes bytes"
        if self.gone:
            self.failed = True
            raise_error(RESET)
        counts = range(min(len(self.unread), len(buffer)), 0, -1) or [0]
        count = self.kernel.decide(self, counts, AGAIN, RESET, MemoryError)
        self.hung_up |= count == 0
        data, self.unread = self.unread[:count], self.unread[count:]
        buffer[:count] = data
        self.read += data
        self.heard += b"" if self.ended else data
        return count

    def send(self, data):
        told = self.begin_call()
        assert data and data == self.owed(), "it sends what it does not owe"
        # Who was reported as ready has room for a byte; another one may have none.
        counts = range(len(data), 0 if told else -1, -1)
        errors = [RESET, MemoryError, AGAIN][: 2 + told]
        count = self.kernel.decide(self, counts, *errors)
        if not count:
            raise_error(AGAIN)
        self.sent += data[:count]
        return count

    def getsockopt(self, *_):
        return b"\x05"  # TCP_FIN_WAIT2: all is acknowledged

    def shutdown(self, how):
        self.ended = self.ended or self.kernel.now
        assert self.failed or not self.owed(), "it ends before the end of the answer"
        looked = self.kernel.turn > (self.kernel.stopped or TURNS)
        excused = self.failed or self.hung_up or self.is_too_long()
        assert looked or excused, "it ends for no reason"
        self.gone = True  # if this fails
        super().shutdown(how)
        self.gone = False

    def close(self):
        assert not self.closed, "closed twice"
        assert self.ended, "closed without shutdown()"
        had_time = self.kernel.now >= self.ended + 0.5
        assert had_time or self.failed or self.hung_up, "no time to hang up"
        super().close()


class Selector:
    def __init__(self, kernel):
        self.kernel = kernel
        self.keys = {}
        self.closed = False
        kernel.selectors.append(self)

    def register(self, sock, event, data=None):
        assert not sock.closed and sock not in self.keys, "registered twice"
        errors = [] if isinstance(sock, Wake) else [NO_MEMORY]
        self.kernel.decide(sock, [None], *errors)
        self.keys[sock] = selectors.SelectorKey(sock, id(sock), event, data)

    def unregister(self, sock):
        del self.keys[sock]

    def modify(self, sock, event, data=None):
        key = self.keys.pop(sock)  # As in selectors: if it fails, it is unregistered.
        self.kernel.decide(sock, [None], NO_MEMORY)
        self.keys[sock] = key._replace(events=event, data=data)

    def select(self, timeout=None):
        self.kernel.check_turn()
        if not self.ready() and timeout is None:
            self.kernel.idle()
            assert self.ready(), "shutdown() does not wake it"
        ready = self.ready()
        # Bit by bit, who of them is ready by now:
        subsets = range((1 << len(ready)) - 1, 0, -1) or [0]
        chosen = self.kernel.decide(self, subsets)
        if not chosen:
            self.kernel.now += max(timeout or 0, 0) + 0.0001
        ready = [key for bit, key in enumerate(ready) if chosen >> bit & 1]
        self.kernel.told = {key.fileobj for key in ready}
        self.kernel.may_accept = len(ready)
        return [(key, key.events) for key in ready]

    def ready(self):
        return [k for k in self.keys.values() if k.fileobj.is_ready(k.events)]

    def close(self):
        self.keys.clear()
        self.closed = True


# ---- The tests -----------------------------------------------------------------------


def replay(streams, *decisions, **setup):
    """Run one schedule. What a failure prints runs it again."""
    choices = Choices(*decisions)
    try:
        Kernel(streams, choices, **setup).run()
    except Exception as error:
        schedule = f"replay({streams}, {choices.decisions}, **{setup})"
        raise AssertionError(schedule) from error
    return choices


EVERY = [  # clients' streams, and a setup: some thousand schedules together
    *[([s], {}) for s in all_streams(4)],
    *[([s], {"faults": 1}) for s in [*all_streams(2), b"x\r\n"]],
    *[([s], {"faults": 2}) for s in [b"", b"x"]],
    *[([s], {"stops": 1}) for s in all_streams(2)],
    *[([s], {"stops": 1, "hangs_up": False}) for s in [b"", b"x", b"\r\n"]],
    ([b""], {"stops": 1, "faults": 1}),
    ([b"x"], {"stops": 1, "faults": 1, "hangs_up": False}),
    ([b"\r\nxx\r\n"], {"max_line": 1}),
    ([b"\r\nxxxx"], {"max_line": 1}),
    ([b"xxx"], {"max_line": 1, "faults": 1}),
    ([b"x", b"\r\n"], {}),
    ([b"x", b""], {"stops": 1}),
    ([b"x", b""], {"faults": 1}),
    ([b"", b"\r\n"], {"faults": 1, "max_clients": 1}),
]


@pytest.mark.parametrize(("streams", "setup"), EVERY)
def test_every_schedule_of_every_short_stream(streams, setup):
    decisions = replay(streams, [], **setup).following()
    while decisions:
        decisions = replay(streams, decisions, **setup).following()


@pytest.mark.parametrize("seed", range(40))
def test_random_schedules_of_long_streams(seed):
    def draw(common, rare):
        is_rare = rare and chance.random() < 0.03
        return common + chance.randrange(rare) if is_rare else chance.randrange(common)

    chance = random.Random(seed)
    pieces = [b"\r\n", b"\r\n", b"\r", b"\n", b"a", b"b", b"c", b"d"]
    setup = {
        "faults": chance.randrange(4),
        "stops": chance.randrange(2),
        "hangs_up": chance.random() < 0.7,
        "max_line": chance.choice([3, 6, 1 << 20, 1 << 20]),
        "max_clients": chance.choice([1, 1000]),
    }
    streams = [chance.choices(pieces, k=chance.randrange(200)) for _ in range(2)]
    replay(list(map(b"".join, streams)), (), draw, **setup)


# PART THREE: THE COMMAND LINE, THE LOG, THE MODULE


@needs_signals
def test_by_default_it_listens_on_both_loopbacks_on_port_12321(run):
    if not all(can_listen(host, 12321) for host in LOOPBACKS):
        pytest.skip("port 12321 is taken")
    expected = [(host, 12321) for host in LOOPBACKS]
    with echo.EchoServer() as server:
        assert server.addresses == expected
    assert run().addresses == expected


def refuse_ipv6(monkeypatch, number, times):
    """Let socket.create_server fail for IPv6, so many times."""
    real, failures = socket.create_server, [OSError(number, "no (while ...)")] * times

    def stand_in(address, **options):
        if options["family"] == socket.AF_INET6 and failures:
            raise failures.pop()
        return real(address, **options)

    monkeypatch.setattr(socket, "create_server", stand_in)


@needs_ipv6
def test_port_0_is_the_same_free_port_on_both_loopbacks(monkeypatch):
    for failures in 0, 1:
        refuse_ipv6(monkeypatch, errno.EADDRINUSE, failures)
        with echo.EchoServer(0) as server:
            (_, port), (_, other) = server.addresses
            assert port == other != 0


def hosts_of(*hosts):
    with echo.EchoServer(0, *hosts) as server:
        return [host for host, _ in server.addresses]


@needs_ipv6
@pytest.mark.parametrize(
    "number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT]
)
def test_a_name_stands_for_its_addresses_of_which_ipv6_may_lack(number, monkeypatch):
    both = [
        (socket.AF_INET6, 6, 0, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, 6, 0, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both * 2)
    assert hosts_of("localhost") == ["::1", "127.0.0.1"]
    refuse_ipv6(monkeypatch, number, 3)
    assert hosts_of("localhost") == ["127.0.0.1"]
    monkeypatch.undo()
    refuse_ipv6(monkeypatch, number, 1)
    assert hosts_of() == ["127.0.0.1"]
    refuse_ipv6(monkeypatch, number, 30)
    for hosts in ["127.0.0.1", "::1"], ["::1", "127.0.0.1"]:
        with pytest.raises(OSError, match=r"cannot listen on \[::1\]:\d+: no"):
            hosts_of(hosts)


def test_an_address_is_named_with_its_scope(monkeypatch):
    monkeypatch.setattr(socket, "getnameinfo", lambda *_: ("fe80::1%eth0", "7"))
    assert echo.host_and_port(("fe80::1", 7, 0, 3)) == ("fe80::1%eth0", 7)
    assert echo.endpoint("fe80::1%eth0", 7) == "[fe80::1%eth0]:7"
    assert echo.endpoint(*echo.host_and_port(None)) == "?:0"  # on macOS


@pytest.fixture
def main(monkeypatch):
    """Run main() in this process, with its signals and its log put back afterwards."""
    numbers = [n for n in signal.Signals if n.name in ("SIGINT", "SIGTERM", "SIGBREAK")]
    before = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr(echo, "log", logging.Logger("echo in this process"))

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["echo.py", *arguments])
        echo.main()

    yield main
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    for number, handler in before.items():
        signal.signal(number, handler)


NO_PORT = "is not a port (0 to 65535); -b takes an address"
NO_COUNT = "is not a whole number above 0"
NO_HOST = "is no host name or IP address (give no port)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "80"], f"argument port: 'x' {NO_PORT}"),
        (["--host", "0.0.0.0"], f"argument port: '0.0.0.0' {NO_PORT}"),
        (["-q", "-v"], "argument -v/--verbose: not allowed with argument -q/--quiet"),
        (["-1"], f"argument port: '-1' {NO_PORT}"),
        (["65536"], f"argument port: '65536' {NO_PORT}"),
        (["--max-line", "0"], f"argument --max-line: '0' {NO_COUNT}"),
        (["--max-line", "1e6"], f"argument --max-line: '1e6' {NO_COUNT}"),
        (["--max-clients", "0"], f"argument --max-clients: '0' {NO_COUNT}"),
        (["--idle-timeout", "nan"], "argument --idle-timeout: 'nan' is not a number"),
        (["-b", ""], f"argument -b/--bind: '' {NO_HOST}"),
        (["-b", "*"], f"argument -b/--bind: '*' {NO_HOST}"),
        (["-b", "localhost:8080"], f"argument -b/--bind: 'localhost:8080' {NO_HOST}"),
        (["-b", "[::1]:80"], f"argument -b/--bind: '[::1]:80' {NO_HOST}"),
        (["-b", "http://x"], f"argument -b/--bind: 'http://x' {NO_HOST}"),
        (["-b", "x" * 64], f"argument -b/--bind: {'x' * 64!r} {NO_HOST}"),
    ],
)
def test_a_bad_argument_is_explained_with_status_2(arguments, message, main, capsys):
    with pytest.raises(SystemExit) as exit:
        main(*arguments)
    assert exit.value.code == 2
    assert f"echo.py: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("hosts", [[], "", ["127.0.0.1", ""]])
def test_no_host_is_not_every_host(hosts):
    with pytest.raises(ValueError, match=r"^no hosts|^'' is no host name"):
        echo.EchoServer(0, hosts)


@pytest.mark.parametrize("limit", [1e6, float("inf"), "100", None])
def test_the_longest_line_is_a_whole_number(limit):
    with pytest.raises(TypeError):
        echo.EchoServer(0, max_line=limit)


@needs_ipv6
def test_an_address_named_twice_is_listened_on_once():
    assert hosts_of(["[::1]", "127.0.0.1", "::1", "127.0.0.1"]) == ["::1", "127.0.0.1"]


@needs_linux
def test_a_link_local_address_without_its_interface_is_explained(main):
    with pytest.raises(SystemExit, match=r"needs its interface, as in fe80::1%eth0\)$"):
        main("-b", "fe80::1", "0")


def test_an_address_that_is_none_of_ours_is_named_with_status_1(main):
    message = r"^echo.py: cannot listen on 192.0.2.1:65535: [^(]+$"
    with pytest.raises(SystemExit, match=message):
        main("-b", "192.0.2.1", "65535")


def test_an_address_in_use_is_named_with_status_1_and_nothing_is_left(main, capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as kept:  # and with it the frames that failed
            main("-b", "127.0.0.2", "-b", "127.0.0.1", str(port))
    message = rf"echo.py: cannot listen on 127.0.0.1:{port}: [^(]+"
    assert re.fullmatch(message, kept.value.code)
    socket.create_server(("127.0.0.2", port)).close()
    assert capfd.readouterr() == ("", "")


def test_a_failing_look_up_is_told_with_status_1(main, monkeypatch):
    def stand_in(*_, **__):
        raise OSError("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", stand_in)
    message = "^echo.py: cannot listen on no.invalid:7: unknown$"
    with pytest.raises(SystemExit, match=message):
        main("-b", "no.invalid", "7")


def test_version_and_help_are_printed_with_status_0(main, capsys):
    for option in "--version", "--help":
        with pytest.raises(SystemExit, match=r"^0$"):
            main(option)
    out, err = capsys.readouterr()
    assert out.startswith(f"echo.py {echo.__version__}\nusage: echo.py ")
    assert err == ""
    for option in "--bind ADDRESS", "--lf", "--max-line BYTES", "--max-clients N", "-q":
        assert option in out


def test_an_older_python_shows_what_it_lacks():
    with open(SCRIPT) as source:
        lines = source.read().splitlines()
    assert "needs Python 3.8" in next(s for s in lines if ":=" in s)  # first rejected
    assert '# requires-python = ">=3.8"' in lines


@needs_signals
@pytest.mark.parametrize(
    ("arguments", "sent", "expected"),
    [
        (["--lf", "--max-line", "3"], b"a\nabc\nabcde", b"a\nabc\n"),
        (["--idle-timeout", "0.3"], b"a\r\nb", b"a\r\n"),
    ],
)
def test_options_reach_the_server(run, arguments, sent, expected):
    with connect(run("0", *arguments)) as client:
        client.sendall(sent)
        assert read_all(client) == expected


@needs_signals
@pytest.mark.parametrize("late", [False, True])
def test_main_serves_until_a_signal_and_a_late_one_closes(main, monkeypatch, late):
    def serve(server):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert refused(server.addresses[0]) == late
        serve_forever(server)

    serve_forever = echo.EchoServer.serve_forever
    monkeypatch.setattr(echo.EchoServer, "serve_forever", serve)
    clock = itertools.count(1000, 60 if late else 0)  # steps of so many seconds
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    before = signal.getsignal(signal.SIGTERM)
    main("-b", "127.0.0.1", "0")
    assert signal.getsignal(signal.SIGTERM) == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not echo.log.handlers and not echo.log.level


@needs_signals
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_slow_look_up_is_ended_by_a_signal_at_once(number, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, socket\n"
        f"socket.getaddrinfo = lambda *_, **__: os.kill(os.getpid(), {number:d})"
    )
    command = (sys.executable, SCRIPT, "0")
    assert in_folder(tmp_path, *command, PYTHONPATH=str(tmp_path)) == (-number, "")


# The log


@needs_signals
def test_each_connection_is_logged_when_it_comes_and_when_it_leaves(run):
    script = run("-b", "127.0.0.1", "0")
    for tail, where in (b"", ""), (b"hel", " in mid-line"):
        with connect(script) as client:
            me = echo.endpoint(*client.getsockname())
            assert script.line() == f"{me} connected"
            assert ask(client, b"hello\r\n")
            client.sendall(tail)
            client.shutdown(socket.SHUT_WR)
            end = f"closed by client{where}, 7 bytes echoed, {len(tail)} dropped"
            assert script.line() == f"{me} disconnected: {end}"


@needs_signals
def test_verbose_prints_each_line_as_printable_ascii_and_cut_short(run):
    nasty = b"\0\x1b[2J\n127.0.0.1:1 connected\r\x7f\xff\xc3\xa9"
    script = run("0", "-v")
    with connect(script) as client:
        assert ask(client, nasty + b"\r\n" + b"y" * 500 + b"\r\n" + b"z" * 80 + b"\r\n")
        assert ask(client, b"\r\n" * 80) and ask(client, b"\r\n" * 85)
    _, lines, _ = script.stop()
    assert all(32 <= ord(c) < 127 for line in lines for c in line)
    shown = [line.partition(" ")[2] for line in lines[1:4]]
    assert shown == [repr(nasty), f"b'{'y' * 80}'...", f"b'{'z' * 80}'"]
    assert sum(line.endswith(" b''") for line in lines) == 160
    assert [line[-2:] for line in lines if " and more lines: " in line] == [" 5"]


def test_the_log_is_ascii_whatever_language_an_error_is_in(monkeypatch, tmp_path):
    with open(tmp_path / "log", "wb") as stdout, contextlib.ExitStack() as undo:
        monkeypatch.setattr(sys, "stdout", stdout)
        echo.LogHandler(undo).emit(logging.makeLogRecord({"msg": "zu gro\xdf"}))
    assert (tmp_path / "log").read_bytes() == b"zu gro\\xdf\n"


def test_a_line_after_one_that_was_cut_begins_on_a_line_of_its_own(
    monkeypatch, tmp_path
):
    cut = iter([3, 100])
    write = os.write
    with open(tmp_path / "log", "wb") as stdout, contextlib.ExitStack() as undo:
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: next(cut)]))
        handler = echo.LogHandler(undo)
        for text in "first", "second":
            handler.emit(logging.makeLogRecord({"msg": text}))
        monkeypatch.undo()
    assert (tmp_path / "log").read_bytes() == b"fir\nsecond\n"


def test_a_stdout_without_a_descriptor_shows_the_log(monkeypatch):
    with contextlib.ExitStack() as undo:
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        echo.LogHandler(undo).emit(logging.makeLogRecord({"msg": "in a notebook"}))
        assert sys.stdout.getvalue() == "in a notebook\n"


# The module


def test_import_starts_nothing_and_installs_no_handler(tmp_path):
    code = """
import logging, signal, threading
before = list(map(signal.getsignal, range(1, signal.NSIG)))
import echo
assert before == list(map(signal.getsignal, range(1, signal.NSIG)))
assert threading.active_count() == 1 and not logging.getLogger("echo").handlers
"""
    assert in_folder(tmp_path, sys.executable, "-c", code, PYTHONPATH=FOLDER) == (0, "")


def test_shutdown_may_be_called_at_any_time_any_number_of_times():
    with echo.EchoServer(0) as server:
        for _ in range(5000):  # more wake-ups than the socket pair holds
            server.shutdown()
        server.serve_forever()
        server.shutdown()
        server.serve_forever()
    server.shutdown()


def test_a_log_handler_that_raises_keeps_nothing_open(monkeypatch):
    def fail(record):
        if "disconnected" in record.getMessage():
            raise ValueError

    monkeypatch.setattr(echo.log, "handle", fail)
    monkeypatch.setattr(echo.log, "level", logging.INFO)
    server = echo.EchoServer(0, "127.0.0.1")

    def serve():
        with pytest.raises(ValueError):
            server.serve_forever()
        ended.set()

    ended = threading.Event()
    threading.Thread(target=serve, daemon=True).start()
    with connected(server, 3) as clients:
        assert all(map(ask, clients))
        clients[0].shutdown(socket.SHUT_WR)  # The log says so, and fails.
        assert [read_all(client) for client in clients] == [b""] * 3
    assert ended.wait(PATIENCE)
    assert refused(server.addresses[0])


def test_a_selector_that_cannot_wait_is_the_end(main, monkeypatch, capfd):
    def fail(*_):
        raise PermissionError(errno.EPERM, "refused")

    monkeypatch.setattr(selectors.DefaultSelector, "select", fail)
    with echo.EchoServer(0) as server, pytest.raises(PermissionError):
        server.serve_forever()
    assert refused(server.addresses[0])
    message = "^echo.py: cannot wait for clients: refused$"
    with pytest.raises(SystemExit, match=message):
        main("0")
    assert capfd.readouterr().err == ""


def test_it_may_be_closed_from_its_own_thread(start, monkeypatch):
    server = start()
    monkeypatch.setattr(echo.log, "handle", lambda record: server.close())
    with connect(server) as client:
        assert read_all(client) == b""
    server.thread.join(PATIENCE)
    assert not server.thread.is_alive()


def test_close_ends_a_server_in_another_thread_and_its_clients(start, caplog):
    server = start()
    with connect(server) as client:
        assert ask(client)
        server.close()
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()
        assert read_all(client) == b""
        assert refused(server.addresses[0])
    assert " disconnected: server closed, " in caplog.messages[-1]
    server.close()
    with echo.EchoServer(server.addresses[0][1], "127.0.0.1") as again:
        assert again.addresses == server.addresses
    again.serve_forever()
