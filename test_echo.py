"""What echo.py promises, as a specification that runs.

Part one says what is promised, over real sockets and processes. It knows the public
names of echo.py, and the script. In part two, a simulated kernel answers in every way
that a kernel may, and lets time pass as it likes.
"""

import bisect
import collections
import contextlib
import errno
import functools
import gc
import importlib.util
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
import textwrap
import threading
import time
import traceback
import types
import warnings

import pytest

import echo

pytestmark = pytest.mark.timeout(60)

SCRIPT = os.path.abspath(echo.__file__)
FOLDER = os.path.dirname(SCRIPT)
PATIENCE = 10  # seconds that a socket, a process or a thread may take
LINE = b"x" * 1022 + b"\r\n"
FLOOD = memoryview(LINE * (1 << 16))  # 64 MiB: more than the kernel holds for anybody
BUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
SIGNALS = [n for n in signal.Signals if n.name in ("SIGINT", "SIGTERM", "SIGBREAK")]
with open(os.path.join(FOLDER, "README.md"), encoding="utf-8") as readme:
    README = readme.read()


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
needs_linux = needs(sys.platform == "linux", "only Linux has /proc and prlimit()")


def dashed(name):
    """Return a name as the id of a test."""
    return re.sub(r"\W+", "-", name).strip("-")


# What the tests say when they fail


def same(got, expected):
    """Compare bytes. A failure tells their lengths, and where they begin to differ."""
    __tracebackhide__ = True
    if got != expected:
        pairs = enumerate(zip(got, expected))
        shorter = min(len(got), len(expected))
        place = next((i for i, (a, b) in pairs if a != b), shorter)
        came, right = (bytes(b[place : place + 16]) for b in (got, expected))
        lengths = f"{len(got)} bytes came, {len(expected)} are right"
        pytest.fail(f"{lengths}; from byte {place} on: {came!r}, right is {right!r}")


def expect(sock, expected):
    """Check that these bytes come next."""
    __tracebackhide__ = True
    data = bytearray()
    while len(data) < len(expected) and (chunk := sock.recv(len(expected) - len(data))):
        data += chunk
    same(data, expected)


def ends(sock, expected=b""):
    """Check that these bytes come, and then EOF."""
    __tracebackhide__ = True
    same(b"".join(iter(lambda: sock.recv(1 << 20), b"")), expected)


def ask(sock, line=b"are you there?\r\n"):
    """Check that a line comes back."""
    __tracebackhide__ = True
    sock.sendall(line)
    expect(sock, line)


@contextlib.contextmanager
def takes(at_least, at_most):
    """Check how many seconds a block takes."""
    started = time.monotonic()
    yield
    assert at_least <= time.monotonic() - started < at_most


def eventually(condition):
    """Wait until something that cannot be waited for is true."""
    __tracebackhide__ = True
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it never happened")
        time.sleep(0.01)


# Clients


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


def is_silent(sock):
    """Tell if nothing comes for a while, not even EOF."""
    return not select.select([sock], [], [], 0.1)[0]


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


def name_of(sock):
    """Return a client's address as the log shows it."""
    host, port, *_ = sock.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# Servers


class Log(logging.Handler):
    """Keeps pairs of a level and a text."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def emit(self, record):
        self.kept.append((record.levelno, record.getMessage()))

    def texts(self, pattern="", level=0):
        return [s for n, s in self.kept if n >= level and re.search(pattern, s)]


@contextlib.contextmanager
def logging_to(handler, level):
    """Keep what is logged, and keep it out of pytest's own report."""
    logger = logging.getLogger("echo")
    before = logger.level, logger.propagate, logger.handlers
    logger.propagate, logger.handlers = False, [handler]
    logger.setLevel(level)
    try:
        yield handler
    finally:
        logger.setLevel(before[0])
        logger.propagate, logger.handlers = before[1:]


@pytest.fixture
def log():
    with logging_to(Log([]), logging.INFO) as handler:
        yield handler


class Thread(threading.Thread):
    """A server in a thread, whose crash is kept."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.crash = server, None
        self.start()

    def run(self):
        try:
            self.server.serve_forever()
        except BaseException as error:
            self.crash = error

    def end(self, *errors):
        """Wait for the end of the server, which may have died of one of these."""
        __tracebackhide__ = True
        self.join(PATIENCE)
        if self.is_alive():
            pytest.fail("the server does not stop")
        if self.crash and not isinstance(self.crash, errors):
            line = traceback.extract_tb(self.crash.__traceback__)[-1].lineno
            pytest.fail(f"the server died: {self.crash!r} at line {line}")


@pytest.fixture
def start(log):
    """Start servers that run in threads, and stop them."""
    with contextlib.ExitStack() as stack:

        def start(hosts="127.0.0.1", **options):
            server = stack.enter_context(echo.EchoServer(0, hosts, **options))
            server.thread = Thread(server)
            stack.callback(server.thread.end)
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
        found = [re.fullmatch(r"listening on \[?(.*?)\]?:(\d+)", s) for s in lines]
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


@pytest.fixture
def main(monkeypatch):
    """Call main() in this process, with these arguments."""

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["echo.py", *arguments])
        echo.main()

    return main


def in_folder(folder, *command, **variables):
    """Run a command in a folder; return its status and what it printed."""
    options = {"capture_output": True, "timeout": 3 * PATIENCE, "cwd": folder}
    done = subprocess.run(command, env={**BUFFERED, **variables}, **options)
    return done.returncode, (done.stdout + done.stderr).decode()


def run_code(folder, code):
    """Run Python code that can import echo."""
    return in_folder(folder, sys.executable, "-c", code, PYTHONPATH=FOLDER)


# PART ONE: WHAT IS PROMISED. First, lines.


def test_a_line_comes_back_as_soon_as_it_is_complete_and_no_part_of_one_before(start):
    with connect(start()) as client:
        client.sendall(b"hel")
        assert is_silent(client)
        client.sendall(b"lo\r\nwor")
        assert client.recv(100) == b"hello\r\n"
        client.sendall(b"ld\r\n\r\n")
        expect(client, b"world\r\n\r\n")


@pytest.mark.parametrize("end", [b"\r\n", b"\n"], ids=["CR-LF", "LF"])
def test_a_line_comes_back_byte_for_byte_whatever_it_holds(start, end):
    every = bytes(n for n in range(256) if n != 10)
    lines = [every, every[::-1], b"\xff\r\x80\0", b"\r", b"\r\r", b""]
    lines += [b"\n", b"a\n\rb\n\n"] if end == b"\r\n" else []
    stream = b"".join(line + end for line in lines)
    with connect(start(lf=end == b"\n")) as client:
        ask(client, stream)
        for byte in stream:  # The rest in as many pieces as the network likes.
            client.sendall(bytes([byte]))
        client.sendall(b"dropped\r")
        client.shutdown(socket.SHUT_WR)
        ends(client, stream)


@needs(hasattr(echo, "take_lines"), "the framing has another name here")
@pytest.mark.parametrize("end", [b"\r\n", b"\n"], ids=["CR-LF", "LF"])
def test_lines_come_back_exactly_however_the_stream_is_cut(end):
    for *letters, i, j in itertools.product(*[b"\r\nx"] * 6, range(7), range(7)):
        stream, inbox, lines = bytes(letters), bytearray(), b""
        for piece in filter(None, (stream[:i], stream[i : i + j], stream[i + j :])):
            taken, inbox = echo.take_lines(inbox, memoryview(piece), end)
            lines += taken
        right = b"".join(line + end for line in stream.split(end)[:-1])
        assert (lines, lines + inbox) == (right, stream), (i, j)


@pytest.mark.parametrize("host", LOOPBACKS)
def test_an_urgent_byte_comes_back_in_its_place(start, host):
    with connect(start(host)) as client:
        client.sendall(b"hel")
        client.send(b"X", socket.MSG_OOB)
        client.sendall(b"lo\r\n")
        expect(client, b"helXlo\r\n")


def test_bare_lf_is_explained_once_per_connection_by_a_warning(start, log):
    server = start()
    with connected(server, 2) as clients:
        for client in clients:
            client.sendall(b"a\n")
            eventually(lambda: log.texts("LF", logging.WARNING))
            client.sendall(b"c\nd\r\n")
            expect(client, b"a\nc\nd\r\n")
            client.sendall(b"\n")
            assert is_silent(client)
            (hint,) = log.texts("LF", logging.WARNING)
            assert hint.startswith(f"{name_of(client)} ")
            assert all(word in hint for word in ("CR LF", "nc -C", "--lf"))
            log.kept.clear()


def test_bare_lf_is_explained_though_the_line_is_too_long(start, log):
    with connect(start(max_line=5)) as client:
        client.sendall(b"a\nb\nc\nd\n")
        ends(client)
    assert log.texts("sent LF alone", logging.WARNING)


# Clients


def test_five_clients_are_answered_within_a_second(start):
    with connected(start(), 5) as clients, takes(0, 1):
        for sock in clients:
            sock.sendall(b"hello\r\n")
        for sock in clients:
            expect(sock, b"hello\r\n")


def test_a_client_that_does_not_read_is_not_read_from(start):
    with connected(start(), 2) as (stalled, other):
        flood(stalled)
        with takes(0, 1):
            ask(other)


@pytest.mark.parametrize("name", ["Default", "Poll", "Select"])
def test_who_half_closes_and_reads_late_gets_every_byte(start, name, monkeypatch):
    selector = getattr(selectors, f"{name}Selector", None)
    if not selector:
        pytest.skip(f"this platform has no {name}Selector")
    monkeypatch.setattr(selectors, "DefaultSelector", selector)
    with connect(start()) as client:
        sent = flood(client)
        client.shutdown(socket.SHUT_WR)
        ends(client, sent[: sent.rfind(b"\n") + 1])


def is_asleep(pid, seconds=0.5):
    """Tell if a process neither wakes up nor uses CPU time for so long."""

    def wake_ups_and_cpu():
        with open(f"/proc/{pid}/status") as status, open(f"/proc/{pid}/stat") as stat:
            switches = re.search(r"\nvoluntary\w+:\s*(\d+)", status.read())[1]
            return switches, stat.read().rpartition(")")[2].split()[11:13]

    before = wake_ups_and_cpu()
    time.sleep(seconds)
    return wake_ups_and_cpu() == before


@needs_linux
def test_waiting_costs_no_system_call_and_no_cpu(run):
    script = run("0")
    with connected(script, 4) as (silent, half_line, stalled, half_closed):
        ask(silent)
        half_line.sendall(b"hel")
        flood(stalled)
        flood(half_closed)
        half_closed.shutdown(socket.SHUT_WR)
        eventually(lambda: is_asleep(script.process.pid))  # All is served.
        assert is_asleep(script.process.pid)


@pytest.mark.parametrize("state", ["mid-line", "owed"])
def test_a_reset_ends_that_client_alone(start, state, log):
    with connected(start(), 2) as (victim, other):
        ask(victim)
        victim.sendall(b"hel") if state == "mid-line" else flood(victim)
        linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
        victim.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        victim.close()
        eventually(lambda: log.texts(" disconnected: "))
        ask(other)
    # macOS and the BSDs say EPIPE of a send after a reset.
    reasons = [errno.ECONNRESET, *([errno.EPIPE] if state == "owed" else [])]
    texts = "|".join(re.escape(os.strerror(number)) for number in reasons)
    assert log.texts(rf" disconnected: ({'.*' if os.name == 'nt' else texts}), \d+ ")


@needs_signals
def test_an_end_reaches_a_client_whose_socket_a_forked_child_has_too(start):
    server = start(idle_timeout=0.3)
    with connect(server) as client:
        ask(client)
        with warnings.catch_warnings():
            # Newer Pythons warn of threads, when the child is there already.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            try:
                signal.alarm(3 * PATIENCE)
                signal.pause()
            finally:
                os._exit(1)
        try:
            ends(client)
            client.shutdown(socket.SHUT_WR)  # The child has this socket, too.
            server.shutdown()
            server.thread.end()
            assert refused(server.addresses[0])
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_nothing_is_kept_of_what_was_sent_nor_of_a_client_that_has_gone(start, log):
    tracemalloc = pytest.importorskip("tracemalloc")  # PyPy has none.
    logging.getLogger("echo").setLevel(logging.WARNING)
    server = start()
    tracemalloc.start()
    for count in 50, 200:  # At the first time, some things are kept for good.
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(count):
            with connect(server) as client:
                ask(client, LINE)
                client.sendall(b"x" * 1000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 200 * 200  # bytes


# Limits


@pytest.mark.parametrize("end", [b"\r\n", b"\n"], ids=["CR-LF", "LF"])
def test_a_line_may_have_one_mib_and_one_byte_more_is_the_end(start, end):
    with connect(start(lf=end == b"\n")) as client:
        ask(client, b"x" * (1 << 20) + end)
        client.sendall(b"a" + end + b"x" * ((1 << 20) + 1) + end + b"never" + end)
        ends(client, b"a" + end)


def test_a_client_that_goes_on_sending_after_the_end_reads_all_it_is_owed(start, log):
    lines = LINE * 400  # more than its kernel takes: a reset would destroy the rest
    with connect(start(max_line=2000)) as client, takes(0, PATIENCE):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.sendall(lines + b"x" * 2002)
        got = b""
        while chunk := client.recv(1 << 13):
            got += chunk
            client.sendall(b"late")
        same(got, lines)
    eventually(lambda: log.texts(": line longer than 2000 bytes, 409600 bytes"))


def test_a_slow_reader_that_goes_on_sending_gets_all_it_is_owed(start):
    lines = LINE * 3000

    def send():
        with contextlib.suppress(OSError):
            sock.sendall(lines + b"x" * 2002)
            while True:
                sock.sendall(b"late")
                time.sleep(0.001)

    with connect(start(max_line=2000)) as sock:
        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        got = bytearray()
        while chunk := sock.recv(1 << 14):
            got += chunk
            time.sleep(0.002)
        same(got, lines)
        sock.shutdown(socket.SHUT_RDWR)  # The sender ends.
        sender.join(PATIENCE)
        assert not sender.is_alive()


def test_client_n_plus_one_waits_and_is_served_when_one_leaves(start, log):
    with connected(start(max_clients=2), 3) as (first, second, third):
        third.sendall(b"hello\r\n")
        ask(first)
        ask(second)
        assert len(log.texts(" connected$")) == 2
        first.close()
        expect(third, b"hello\r\n")


@needs_ipv6
def test_a_listener_that_fails_shuts_nobody_out_at_another(start, monkeypatch):
    def accept(sock):
        if sock.family == socket.AF_INET:
            raise OSError(errno.EINVAL, "broken")
        return real(sock)

    real, server = socket.socket.accept, start(["127.0.0.1", "::1"])
    monkeypatch.setattr(socket.socket, "accept", accept)
    with connect(server.addresses[0]), connect(server.addresses[1]) as other:
        ask(other)


@needs_signals
def test_the_soft_limit_of_descriptors_is_raised_and_never_lowered(tmp_path):
    code = """
import echo, resource
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for soft, clients in (40, 60), (200, 10):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    echo.raise_descriptor_limit(clients)
    now = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft <= now[0] and clients < now[0] <= max(200, clients + 100), now
    assert now[1] == hard
"""
    assert run_code(tmp_path, code) == (0, "")


@needs_signals
def test_out_of_descriptors_accepting_rests_and_the_others_are_served(run):
    shell = ("sh", "-c", 'ulimit -n 40; exec "$@"', "sh")
    script = run("-q", "0", "--max-clients", "60", prefix=shell)
    told = "only 40 descriptors for 60 clients: raise the limit (ulimit -n), or lower "
    assert script.line() == told + "--max-clients"
    with takes(1, 6), connected(script, 60) as clients:
        reason = os.strerror(errno.EMFILE)
        assert script.line() == f"cannot accept: {reason}; retry in 1 s"
        ask(clients[0])
        for client in clients[:30]:
            client.close()
        ask(clients[-1])
    assert script.stop()[::2] == (0, b"")


def test_closing_goes_on_when_a_log_handler_raises(log):
    def emit(record):
        raise ValueError("formatting field not found in record")

    server = echo.EchoServer(0, "127.0.0.1")
    thread = Thread(server)
    with connected(server, 3) as clients:
        for client in clients:
            ask(client)
        log.emit = emit  # It raises as pytest's own handler may.
        with contextlib.suppress(ValueError):
            server.close()
        thread.end(ValueError)
        for client in clients:
            ends(client)
        assert refused(server.addresses[0])


@needs_signals
def test_a_selector_that_cannot_wait_is_the_end_with_status_1(tmp_path):
    code = f"""
import errno, runpy, selectors, sys
def select(*_):
    raise OSError(errno.ENOSYS, "cannot wait here")
selectors.DefaultSelector.select = select
sys.argv = [{SCRIPT!r}, "-b", "127.0.0.1", "-q", "0"]
runpy.run_path({SCRIPT!r}, run_name="__main__")
"""
    status, printed = run_code(tmp_path, code)
    assert status == 1
    assert re.fullmatch(r"listening on .*\n.*cannot wait here\n", printed)


# The command line


@needs_signals
def test_by_default_it_listens_on_both_loopbacks_on_port_12321(run):
    if not all(can_listen(host, 12321) for host in LOOPBACKS):
        pytest.skip("port 12321 is taken")
    expected = [(host, 12321) for host in LOOPBACKS]
    with echo.EchoServer() as server:
        assert server.addresses == expected
    assert run().addresses == expected


@needs_ipv6
def test_each_address_is_listened_on_once_and_on_one_port():
    if not all(can_listen(host, 12321) for host in LOOPBACKS):
        pytest.skip("port 12321 is taken")
    both = ("127.0.0.1", "::1"), ["localhost", "[::1]", "127.0.0.1", "localhost"]
    for arguments in [(), *((0, hosts) for hosts in both)]:
        with echo.EchoServer(*arguments) as server:
            assert {host for host, _ in server.addresses} == {*LOOPBACKS}
            (_, port), (_, same_port) = server.addresses
        assert port == same_port
        assert (port == 12321) == (not arguments)


WRONG = [  # arguments, and words of the message
    (["x"], ["'x'", "port"]),
    (["localhost", "8080"], ["'localhost'", "-b"]),
    (["-q", "-v"], ["-v/--verbose", "-q/--quiet"]),
    (["65536"], ["'65536'", "65535"]),
    (["--max-line", "0"], ["--max-line", "'0'"]),
    (["--max-clients", "0"], ["--max-clients", "'0'"]),
    (["--max-clients", "1.5"], ["--max-clients", "'1.5'"]),
    (["--idle-timeout", "nan"], ["--idle-timeout", "'nan'"]),
    (["-b", ""], ["-b/--bind", "''"]),
    (["-b", "*"], ["-b/--bind", "'*'"]),
    (["-b", "localhost:8080"], ["-b/--bind", "'localhost:8080'", "port"]),
    (["-b", "http://localhost"], ["-b/--bind", "'http://localhost'"]),
    (["-b", "x" * 64], ["-b/--bind", repr("x" * 64)]),
]
NAMES = [" ".join(arguments)[:24] for arguments, _ in WRONG]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=NAMES)
def test_a_bad_argument_is_named_with_status_2(arguments, words, main, capsys):
    with pytest.raises(SystemExit) as exit:
        main(*arguments)
    last = capsys.readouterr().err.splitlines()[-1]
    assert exit.value.code == 2
    assert last.startswith("echo.py: error: ")
    assert all(word in last for word in words)


CANNOT = {
    "an address of others": (["-b", "192.0.2.1", "65535"], "192.0.2.1:65535: [^(]+"),
    "one of two": (
        ["-b", "127.0.0.1", "-b", "192.0.2.1", "0"],
        r"192.0.2.1:\d+: [^(]+",
    ),
    "a name of none": (["-b", "no.invalid", "7"], "no.invalid:7: .+"),
    "without interface": (["-b", "fe80::1", "7"], r"\[fe80::1\]:7: .*"),
}


@pytest.mark.parametrize("name", CANNOT, ids=dashed)
def test_an_address_that_cannot_be_bound_is_named_with_status_1(main, name, capfd):
    arguments, message = CANNOT[name]
    with pytest.raises(SystemExit, match=f"^echo.py: cannot listen on {message}$"):
        main(*arguments)
    assert capfd.readouterr() == ("", "")


def test_a_port_belongs_to_one_server_and_nothing_is_left_of_the_other(main, capfd):
    with echo.EchoServer(0, "127.0.0.1") as server:
        port = server.addresses[0][1]
        with pytest.raises(OSError):
            echo.EchoServer(port, "127.0.0.1")
        with pytest.raises(SystemExit, match=rf"^echo.py: .* 127.0.0.1:{port}: [^(]+$"):
            main("-b", "127.0.0.1", str(port))
    socket.create_server(("127.0.0.1", port)).close()
    assert capfd.readouterr() == ("", "")


def test_help_is_enough_by_itself(main, capsys):
    for option in "--version", "--help":
        with pytest.raises(SystemExit, match=r"^0$"):
            main(option)
    out, err = capsys.readouterr()
    assert err == ""
    options = "--bind ADDRESS/--lf/--max-line BYTES/--max-clients N/--quiet/--verbose"
    defaults = "/CR LF/12321/127.0.0.1/::1/1048576/1000/--idle-timeout SECONDS/never"
    hints = "/0.0.0.0/ free /repeated/nc "
    for text in (options + defaults + hints).split("/"):
        assert text in " ".join(out.split())


def test_an_older_python_shows_what_it_lacks():
    with open(SCRIPT, encoding="utf-8") as source:
        lines = source.read().splitlines()
    assert "needs Python 3.8" in next(s for s in lines if ":=" in s)  # first rejected
    assert '# requires-python = ">=3.8"' in lines


@needs_signals
def test_options_reach_the_server(run):
    script = run("0", "--lf", "--max-line", "3", "--idle-timeout", "0.3")
    for sent in b"a\nabc\nabcde", b"a\nabc\nabc":  # too long, and idle
        with connect(script) as client:
            client.sendall(sent)
            ends(client, b"a\nabc\n")
    log = "\n".join(script.stop()[1])
    assert ": line longer than 3 bytes, " in log and ": idle for 0.3 s, " in log


# What it prints


@needs_signals
@pytest.mark.parametrize("host", LOOPBACKS)
def test_each_connection_is_logged_when_it_comes_and_when_it_leaves(run, host):
    script = run("-b", host, "0")
    for tail, where in (b"", ""), (b"hel", " in mid-line"):
        with connect(script) as client:
            me = name_of(client)
            assert script.line() == f"{me} connected"
            ask(client, b"hello\r\n")
            client.sendall(tail)
            client.shutdown(socket.SHUT_WR)
            end = f"closed by client{where}, 7 bytes echoed, {len(tail)} dropped"
            assert script.line() == f"{me} disconnected: {end}"


@needs_signals
def test_verbose_prints_each_line_as_printable_ascii_and_cut_short(run):
    nasty = b"\0\x1b[2J\n127.0.0.1:1 connected\r\x7f\xff\xc3\xa9"
    long, longer = b"\xff" * 80, b"y" * 500
    script = run("0", "-v")
    with connect(script) as client:
        ask(client, b"\r\n".join([nasty, longer, long, b""]))
        ask(client, b"\r\n" * 80)
        ask(client, b"\r\n" * 85)
    lines = script.stop()[1]
    assert all(32 <= ord(c) < 127 for line in lines for c in line)
    shown = [line.partition(" ")[2] for line in lines[1:4]]
    assert shown == [repr(nasty), f"b'{'y' * 80}'...", repr(long)]
    assert sum(line.endswith(" b''") for line in lines) == 160
    assert [line[-2:] for line in lines if " and more lines: " in line] == [" 5"]


def use(address, times):
    for _ in range(times):
        with connect(address) as client:
            ask(client)


@needs_signals
def test_a_log_pipe_that_nobody_reads_stops_nobody(run):
    script = run("-b", "127.0.0.1", "0")
    use(script, 1200)  # about 100 bytes of log each: more than a pipe holds
    pipe = script.process.stdout.fileno()
    while select.select([pipe], [], [], 0.2)[0]:
        os.read(pipe, 1 << 16)
    with connect(script) as client:  # Now the log goes on.
        ask(client)
        assert script.line() == f"{name_of(client)} connected"
    script.process.stdout.close()
    use(script, 3)
    script.process.stdout = None
    assert script.stop() == (0, [], b"")


@needs_linux
def test_after_a_log_line_that_was_cut_the_next_one_begins_a_line(run, tmp_path):
    import resource

    path = tmp_path / "log"
    with open(path, "wb") as stdout:
        script = run("-b", "127.0.0.1", "0", ready=False, stdout=stdout)
        eventually(lambda: path.read_bytes().endswith(b"\n"))
        address = "127.0.0.1", int(path.read_bytes().split()[2].rpartition(b":")[2])
        limit = functools.partial(resource.prlimit, script.process.pid)
        hard = limit(resource.RLIMIT_FSIZE)[1]
        limit(resource.RLIMIT_FSIZE, (1000, hard))  # like a full disk
        use(address, 20)
        eventually(lambda: len(path.read_bytes()) == 1000)
        limit(resource.RLIMIT_FSIZE, (hard, hard))
        use(address, 3)
        assert script.stop()[::2] == (0, b"")
    assert len(path.read_bytes()) > 1200
    assert not re.search(r".127\.0\.0\.1:\d+ (dis)?conn", path.read_text())


@needs_signals
def test_a_terminal_that_nobody_reads_stops_nobody_and_stays_as_it_was(run):
    terminal, stdout = os.openpty()
    with open(terminal, "rb", 0) as screen, open(stdout, "wb", 0):
        script = run("-b", "127.0.0.1", "0", ready=False, stdout=stdout)
        use(("127.0.0.1", int(screen.readline().rpartition(b":")[2])), 300)
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
    use(address, 2)
    assert script.stop()[::2] == (0, b"")


def test_main_shows_its_log_without_a_descriptor_and_leaves_nothing_behind(main):
    logger, out = logging.getLogger("echo"), io.StringIO()
    handlers = [lambda *_: None for _ in SIGNALS]
    before = list(map(signal.signal, SIGNALS, handlers))
    kept = logger.level, list(logger.handlers)
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.daemon = True
    timer.start()
    with contextlib.redirect_stdout(out):
        main("-b", "127.0.0.1", "0")
    assert list(map(signal.signal, SIGNALS, before)) == handlers
    assert (logger.level, logger.handlers) == kept
    assert signal.set_wakeup_fd(-1) == -1
    if hasattr(signal, "pthread_sigmask"):
        assert not {*SIGNALS} & {*signal.pthread_sigmask(signal.SIG_BLOCK, [])}
    assert re.match(r"listening on 127\.0\.0\.1:\d+\n", out.getvalue())


# Stopping


@needs_signals
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_status_0_though_clients_sit_idle(run, number):
    script = run("0")
    with connect(script.addresses[0]) as client, connect(script.addresses[-1]) as half:
        half.sendall(b"hel")
        ask(client)
        with takes(0.5, 3):  # a moment to hang up
            status, lines, err = script.stop(number)
        assert (status, err) == (0, b"")
        ends(client)
        ends(half)
    assert sum(" disconnected: server stopping, " in line for line in lines) == 2


@needs_signals
def test_those_who_came_before_the_stop_are_answered(run):
    script = run("0")
    script.process.send_signal(signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        addresses = script.addresses * 25
        clients = [stack.enter_context(connect(address)) for address in addresses]
        for client in clients:
            client.sendall(b"hello\r\n")
        script.process.send_signal(signal.SIGTERM)
        script.process.send_signal(signal.SIGCONT)
        for client in clients:
            ends(client, b"hello\r\n")
            client.close()
    assert script.stop()[0] == 0


@needs_linux
def test_what_a_client_sends_after_the_stop_costs_it_nothing(start, log):
    server = start()
    with connect(server) as client:
        client.sendall(LINE * 300)
        expect(client, LINE)
        server.shutdown()
        eventually(lambda: refused(server.addresses[0]))
        client.sendall(b"late\r\n")
        time.sleep(1)  # longer than a silent client is given
        client.sendall(b"later\r\n")
        got = len(LINE) + sum(map(len, iter(lambda: client.recv(1 << 20), b"")))
    server.thread.end()
    assert log.texts(f": server stopping, {got} bytes echoed, ")


def test_those_who_came_in_a_pause_of_accepting_are_answered(start, log, monkeypatch):
    def accept(sock):
        if not failed:
            failed.append(sock)
            raise OSError(errno.EPROTO, "failed once")
        return real(sock)

    failed, real, server = [], socket.socket.accept, start()
    monkeypatch.setattr(socket.socket, "accept", accept)
    with connect(server) as client:
        client.sendall(b"hello\r\n")
        eventually(lambda: log.texts("cannot accept"))
        server.shutdown()
        ends(client, b"hello\r\n")


def test_a_place_that_is_free_at_the_stop_is_given_to_who_waits_for_it(
    log, monkeypatch
):
    with echo.EchoServer(0, "127.0.0.1", max_clients=1) as server:
        monkeypatch.setattr(log, "emit", lambda record: server.shutdown())
        connect(server).close()  # It takes the only place. The log stops the server.
        with connect(server) as second:
            second.sendall(b"hello\r\n")
            server.serve_forever()
            ends(second, b"hello\r\n")


@needs_signals
def test_a_second_signal_ends_it_at_once_but_not_within_a_second(run):
    script = run("0")
    with connect(script) as client:
        flood(client)
        with takes(1.1, 4):
            script.process.send_signal(signal.SIGTERM)
            notices = iter(script.line, "")
            notice = next(line for line in notices if line.startswith("stopping: "))
            for pause in 0.1, 0.2, 0.8:  # A wrapper may send it on, late.
                script.process.send_signal(signal.SIGINT)
                with pytest.raises(subprocess.TimeoutExpired):
                    script.process.wait(pause)
            assert script.stop()[::2] == (0, b"")
    for words in "clients left: 1", "for 5 s at most", "second signal":
        assert words in notice


@needs_signals
def test_signals_may_come_at_any_time(run):
    script = run("0", "-q")
    deadline = time.monotonic() + PATIENCE
    while script.process.poll() is None and time.monotonic() < deadline:
        script.process.send_signal(signal.SIGTERM)
    assert script.process.wait(PATIENCE) == 0
    assert script.process.stderr.read() == b""


@needs_signals
def test_until_it_listens_a_signal_ends_it_without_a_traceback(tmp_path):
    code = f"""
import os, runpy, signal, socket, sys
socket.getaddrinfo = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
sys.argv = [{SCRIPT!r}, "0"]
runpy.run_path({SCRIPT!r}, run_name="__main__")
"""
    assert run_code(tmp_path, code) == (-signal.SIGINT, "")


@needs_signals
def test_a_background_job_where_sigint_comes_ignored_can_be_interrupted(run):
    script = run("0", prefix=("sh", "-c", 'trap "" INT; exec "$@"', "sh"))
    assert script.stop(signal.SIGINT) == (0, [], b"")


UNSHARE = ("unshare", "--pid", "--fork", "--kill-child")


@needs(shutil.which("unshare"), "needs unshare")
def test_as_pid_1_it_can_be_terminated(run):
    if subprocess.call([*UNSHARE, "true"], stderr=subprocess.DEVNULL):
        pytest.skip("needs the right to use unshare")
    script = run("0", prefix=UNSHARE)
    pid = script.process.pid
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        os.kill(int(children.read()), signal.SIGTERM)
    assert script.process.wait(PATIENCE) == 0


# As a module


def test_import_starts_nothing_and_installs_no_handler(tmp_path):
    code = """
import logging, signal, threading
before = list(map(signal.getsignal, range(1, signal.NSIG)))
import echo
assert before == list(map(signal.getsignal, range(1, signal.NSIG)))
assert threading.active_count() == 1 and not logging.getLogger("echo").handlers
"""
    assert run_code(tmp_path, code) == (0, "")


REFUSED = {
    "max_line": [1e6, float("inf"), "100", 0, -1],
    "max_clients": [0],
    "idle_timeout": [0, float("nan")],
    "port": [-1, 65536],
    "hosts": [[], (), "", ["127.0.0.1", ""], "*", "localhost:80"],
}


@pytest.mark.parametrize("option", REFUSED)
def test_a_wrong_argument_is_refused_at_once(option):
    for value in REFUSED[option]:
        with pytest.raises((TypeError, ValueError)):
            echo.EchoServer(**{"port": 0, "hosts": "127.0.0.1", option: value})


def test_shutdown_may_be_called_at_any_time_any_number_of_times():
    with echo.EchoServer(0) as server:
        for _ in range(5000):  # more wake-ups than the socket pair holds
            server.shutdown()
        Thread(server).end()
        server.shutdown()
    server.shutdown()


def test_it_may_be_closed_from_its_own_thread(start, log):
    server = start()
    log.emit = lambda record: server.close()
    with connect(server) as client:
        ends(client)
    server.thread.end()


def test_close_ends_a_server_in_another_thread_and_its_clients(start, log):
    server = start()
    with connect(server) as client:
        ask(client)
        server.close()
        server.thread.end()
        ends(client)
        assert refused(server.addresses[0])
    assert log.texts(" disconnected: server closed, ")
    server.close()
    with echo.EchoServer(server.addresses[0][1], "127.0.0.1") as again:
        assert again.addresses == server.addresses


# The README


def block(language, beginning=""):
    """Return the only block of code in the README that begins so."""
    blocks = rf"^```{language}\n({beginning}.*?)^```$"
    (text,) = re.findall(blocks, README, re.M | re.S)
    return text


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


def test_the_short_ci_program_keeps_the_status(tmp_path):
    shutil.copy(SCRIPT, tmp_path / "echo.py")
    (tmp_path / "with_echo.py").write_text(block("python", "import os, subprocess"))
    use = "import os, socket; s = socket.create_connection(('localhost', "
    use += "os.environ['ECHO_PORT']), 5); s.sendall(b'hello\\r\\n'); print(s.recv(9))"
    for status in 0, 3:
        command = (sys.executable, "-c", f"{use}; raise SystemExit({status})")
        expected = status, f"b'hello\\r\\n'{os.linesep}"
        assert in_folder(tmp_path, sys.executable, "with_echo.py", *command) == expected


@pytest.mark.parametrize("mode", ["prepend", "importlib"])
@pytest.mark.parametrize("package", [False, True], ids=["a-folder", "a-package"])
def test_the_pytest_fixture_works_in_every_layout(tmp_path, mode, package):
    shutil.copy(SCRIPT, tmp_path / "echo.py")
    (tmp_path / "pytest.ini").write_text(block("ini", r"\[pytest\]"))
    (tmp_path / "tests").mkdir()
    if package:
        (tmp_path / "tests" / "__init__.py").touch()
    recipe = block("python", "import socket\nimport threading\n\nimport pytest")
    (tmp_path / "tests" / "test_it.py").write_text(recipe)
    command = (sys.executable, "-m", "pytest", "-q", f"--import-mode={mode}")
    status, printed = in_folder(tmp_path, *command, "-p", "no:cacheprovider")
    assert status == 0, printed
    assert "1 passed" in printed


SMALL = r"import selectors\nimport socket\n\nselector"
LINES = r"import selectors\nimport socket\nfrom"
POLITE = r"import socket\ns = [^\n]*timeout=5\)\n"
HALF = r'import socket\ns = [^\n]*\ns\.sendall\(b"hel"\)'
STALL = r'import socket\ns = [^\n]*\ns\.sendall\(b"hello\\r\\n" \* 10\*\*7\)'
RUDE = r"import socket, time\n"


@contextlib.contextmanager
def program(text):
    """Run a server of the README on a free port. Yield its process and its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    code = text.replace("12321", str(address[1]))
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **options) as process:
        try:
            eventually(lambda: not refused(address))
            yield process, address
        finally:
            process.kill()


def client(beginning, address, seconds=PATIENCE):
    """Run a client of the README. Return what it printed; None if it never ends."""
    code = block("python", beginning).replace("12321", str(address[1]))
    command = [sys.executable, "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    return (done.stdout + done.stderr).decode().replace("\r\n", "\n")


def test_the_first_server_of_the_lesson_serves_a_polite_client_and_sends_half_lines():
    with program(block("python", SMALL)) as (_, address):
        assert client(POLITE, address) == "b'hello\\r\\n'\n"
        assert client(HALF, address) == "b'hel'\nb'lo\\r\\n'\n"


def test_the_first_server_of_the_lesson_is_stopped_by_a_client_that_does_not_read():
    with program(block("python", SMALL)) as (_, address), connect(address) as stalled:
        flood(stalled)
        assert "timed out" in client(POLITE, address)


@needs_linux
def test_the_first_server_of_the_lesson_is_ended_by_a_reset():
    with program(block("python", SMALL)) as (process, address):
        client(RUDE, address)
        assert process.wait(PATIENCE) == 1
        assert b"ConnectionResetError" in process.stderr.read()


def test_the_second_server_of_the_lesson_survives_all_three():
    with program(block("python", LINES)) as (process, address):
        assert client(HALF, address, seconds=1) is None
        assert client(STALL, address, seconds=1) is None
        client(RUDE, address)
        with connect(address) as stalled:
            flood(stalled)
            assert client(POLITE, address) == "b'hello\\r\\n'\n"
        assert process.poll() is None


def exercise(beginning, before_loop=""):
    """Return the second server with an answer in it."""
    mark, loop = "selector = selectors.DefaultSelector()\n", "while True:\n"
    server, answer = block("python", LINES), block("python", beginning)
    assert server.count(mark) == server.count(loop) == 1
    server = server.replace(mark, f"{answer}\n\n{mark}")
    return server.replace(loop, before_loop + loop)


def test_exercise_1_upper_case():
    old, new = (
        "client.outbox += client.inbox[:end]\n",
        block("python", r" +client\.out"),
    )
    server = block("python", LINES)
    assert server.count(old) == 1
    server = server.replace(old, new.lstrip(" "))
    with program(server) as (_, address), connect(address) as sock:
        sock.sendall(b"hello\r\n")
        expect(sock, b"HELLO\r\n")


def test_exercise_2_a_store():
    with program(exercise("store = ")) as (_, address), connect(address) as sock:
        sock.sendall(b"SET a 1 2\r\nGET a\r\nGET b\r\nGE")
        expect(sock, b"OK\r\n1 2\r\n?\r\n")
        sock.sendall(b"T a\r\n")
        expect(sock, b"1 2\r\n")


def test_exercise_3_a_chat():
    with contextlib.ExitStack() as stack:
        _, address = stack.enter_context(program(exercise("LIMIT = ")))
        one, other, stalled = stack.enter_context(connected(address, 3))
        for sock in other, stalled:  # When one hears them, all have been accepted.
            sock.sendall(b"here\r\n")
        expect(one, b"here\r\nhere\r\n")
        one.sendall(b"hi\r\n")
        other.shutdown(socket.SHUT_RDWR)
        for _ in range(20):
            one.sendall(LINE * 1024)
        with contextlib.suppress(ConnectionError):  # The stalled one has been closed.
            while stalled.recv(1 << 20):
                pass


def test_exercise_4_slow_work():
    server = exercise("import queue\n", "selector.register(waker, EVENT_READ)\n")
    with program(server) as (_, address), connected(address, 5) as clients, takes(1, 4):
        for sock in clients:
            sock.sendall(b"a\r\nb")
        for sock in clients:
            expect(sock, b"A\r\n")


def test_every_fault_has_a_guard_that_stands_once_and_a_test_that_exists():
    with open(SCRIPT, encoding="utf-8") as script:
        code = script.read()
    faults = README.partition("\n## Faults\n")[2].partition("\n## ")[0]
    guards = re.findall(r"^ +- Guard, in `([\w.]+)`: `(.+)`$", faults, re.M)
    tests = re.findall(r"^ +- Test: `(\w+)`$", faults, re.M)
    assert len(guards) == len(tests) == len(re.findall(r"^\d+\. ", faults, re.M)) > 0
    for place, guard in guards:
        function = re.findall(r"def (\w+)\(", code[: code.find(guard)])[-1]
        assert (code.count(guard), function) == (1, place.rpartition(".")[2]), guard
    assert [name for name in tests if name not in globals()] == []


# PART TWO: EVERY SCHEDULE

# A real kernel mostly takes all that is sent, answers at once, and hardly ever runs out
# of memory. The one below does whatever a kernel may do: bytes come in any pieces and
# at any time, any part of what is sent is taken, any call may fail, and the clock is
# its own. `Choices` decides what each call answers. Short streams get every combination
# of answers, depth first; long ones get some, in a random walk.
#
# There is one seam, at the end: a fresh echo.py is loaded while the modules socket,
# selectors and time are replaced by copies that ask the simulation. Whenever the server
# waits, and in each call, the promises are checked. The first one that is broken is
# kept and shown, whatever the server does with the exception.

AGAIN, RESET, NO_MEMORY = errno.EAGAIN, errno.ECONNRESET, errno.ENOMEM
LASTING = (errno.EMFILE, errno.ENOSYS, errno.EPERM, errno.EINVAL, MemoryError)
PASSING = (AGAIN, errno.ECONNABORTED)
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
NEVER = float("inf")
TURNS = 9000  # more than any schedule here needs
MOMENT = 0.5  # seconds of silence that a client has at least to hang up
LINGER = 5.0  # seconds that an end may take
LATE = 0.5  # seconds by which any of these times may be missed
DELAYS = (0.3, 2.0, 7.0)  # seconds for which a client, or the server, stands still
SETUP = {
    "faults": 0,  # how many calls may fail
    "stops": (),  # methods that are called at a time that the choices decide
    "at": {},  # methods that are called at a certain time
    "delays": False,  # whether clients, and the server, may stand still
    "leaves": "half-closes",  # or so many seconds after the server's EOF
    "acks": 0,  # seconds after which the server's EOF is acknowledged
    "room": None,  # what the first send takes, and for how long there is no room then
    "hosts": ("127.0.0.1",),
    "no_ipv6": 0,  # the error
    "kind": "DefaultSelector",
    "most": None,  # clients, where that is not --max-clients
    "level": logging.INFO,
    "cpu": NEVER,  # process time that may be used
}


def error_of(error):
    return MemoryError() if error is MemoryError else OSError(error, os.strerror(error))


class Violation(BaseException):
    """A broken promise. It is no Exception: the server shall not catch it."""


class Choices:
    """Decisions: numbers of options. What is not decided yet is drawn, or 0."""

    def __init__(self, decisions=(), draw=lambda common, rare: 0):
        self.decisions, self.draw = list(decisions), draw
        self.widths = []  # how many options there were, for each decision made

    def choose(self, common, rare):
        """Return the number of an option. The rare ones come last."""
        if common + rare == 1:
            return 0
        if len(self.widths) == len(self.decisions):
            self.decisions.append(self.draw(common, rare))
        self.widths.append(common + rare)
        decision = self.decisions[len(self.widths) - 1]
        return decision if decision < common + rare else 0

    def following(self):
        """Return the decisions that come next, depth first; after the last, nothing."""
        decisions = self.decisions[: len(self.widths)]
        while decisions and decisions[-1] + 1 >= self.widths[len(decisions) - 1]:
            decisions.pop()
        return [*decisions[:-1], decisions[-1] + 1] if decisions else []


class Kernel:
    """The time, the sockets, and the promises.

    A client's stream is bytes, or a list of bytes and of the seconds between them.
    """

    current = None

    def __init__(self, streams, choices, **setup):
        vars(self).update({k: setup.pop(k, v) for k, v in SETUP.items()})
        self.streams, self.choices, self.limits = streams, choices, setup
        self.max_clients = self.most or setup.get("max_clients", 1000)
        self.idle_timeout = setup.get("idle_timeout", NEVER)
        self.now, self.turn = 1000.0, 0
        self.at = {name: self.now + seconds for name, seconds in self.at.items()}
        self.sockets, self.listeners, self.accepted = [], [], []
        self.told = set()  # sockets reported as ready, and not used since then
        self.wakes = 0  # bytes in the socket pair
        self.newcomers, self.most_newcomers = 0, 0  # in this turn
        self.useless, self.moved = 0, self.now  # turns without progress; the last one
        self.rest_until, self.shortages, self.cannot_wait = 0.0, 0, False
        self.pauses = []  # when the server stood still, and when it went on
        self.stopped = self.closed = None  # when shutdown() and close() were called
        self.early = False  # whether that was before all was done
        self.selector, self.log, self.violation = None, [], ""
        self.calls = collections.deque(maxlen=30)

    def must(self, condition, promise):
        """Keep the first promise that is broken, and end the run."""
        if self.violation or not condition:
            self.violation = self.violation or promise
            raise Violation(self.violation)

    def note(self, result, name, *arguments):
        if not self.violation:  # What follows from it is not shown.
            self.calls.append((self.now, name, arguments, result))

    def progress(self):
        self.useless, self.moved = 0, self.now

    def run(self):
        Kernel.current = self
        echo = simulated_echo(self.kind)
        budget, self.faults, self.stops = (self.faults, self.stops), 0, ()
        hosts = [self.hosts] if self.hosts else []
        with logging_to(Log(self.log), self.level), contextlib.suppress(Violation):
            try:
                self.server = echo.EchoServer(0, *hosts, **self.limits)
                self.faults, self.stops = budget
                self.server.serve_forever()
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                is_right = self.cannot_wait and isinstance(error, OSError)
                self.must(is_right, f"it dies: {error!r} at line {last.lineno}")
            else:
                self.must(not self.cannot_wait, "nobody hears that it cannot wait")
            self.check_end()
        return self

    def decide(self, sock, common, rare=(), errors=()):
        """Return one of the options, or spend a fault; before that, perhaps stop."""
        rare = rare if self.delays else ()
        options = [*rare, *(errors if self.faults else ()), *self.stops]
        number = self.choices.choose(len(common), len(options)) - len(common)
        if number < 0:
            return common[number]
        if number < len(rare):
            return rare[number]
        if number >= len(options) - len(self.stops):
            self.stop(options[number])
            return self.decide(sock, common, rare, errors)
        self.faults -= 1
        sock.fail(options[number])
        raise error_of(options[number])

    def stop(self, name, early=True):
        """Call shutdown() or close(), as a signal or another thread would."""
        self.stops = tuple(n for n in self.stops if n != name)
        self.at.pop(name, None)
        self.early = self.early or early
        self.note(None, name)
        if name == "close":
            self.closed = self.now
        if self.stopped is None:
            self.stopped, self.stopped_turn = self.now, self.turn
            self.was_full = self.full()
            for client in self.accepted:
                client.doomed = min(client.doomed, self.now)
        getattr(self.server, name)()

    def open(self):
        return [client for client in self.accepted if not client.closed]

    def full(self):
        return len(self.open()) >= self.max_clients

    def waiting(self):
        return [listener for listener in self.listeners if listener.queue]

    def pass_time(self, timeout):
        """Nobody is ready: let the time pass."""
        end = NEVER if timeout is None else self.now + max(timeout, 0)
        moments = [t for client in self.open() for t in client.moments()]
        moments += [s.queue[0][2] for s in self.waiting()]
        moments += self.at.values()
        moment = min((t for t in moments if self.now < t < NEVER), default=0)
        is_over = not (moment or self.open() or self.waiting() or self.stopped)
        if moment and moment <= end:
            self.now = moment
            for name in [name for name, t in self.at.items() if t <= self.now]:
                self.stop(name)
        elif end < NEVER and (not is_over or self.now < self.rest_until):
            self.now = end + 0.000001
        else:  # Nothing is left to come, and the server waits.
            self.must(self.stopped is None, "it hangs, though it was told to stop")
            self.must(self.full() or not self.waiting(), "it hangs: newcomers wait")
            self.now += 60
            self.check_times()
            self.stop("shutdown", early=False)

    def check_turn(self):
        """What holds whenever the server waits."""
        self.must(not self.cannot_wait, "a selector that cannot wait is used again")
        self.turn, self.useless, self.newcomers = self.turn + 1, self.useless + 1, 0
        self.must(self.turn < TURNS, "it is busy without end")
        calm = self.useless <= 8 + 10 * (self.now - self.moved)
        self.must(calm, "it is busy though nothing happens")
        left_out = [sock for sock in self.told if not sock.closed]
        self.must(not left_out, "somebody who was ready was left out")
        if self.stopped is None:
            watched = [s in self.selector.keys for s in self.listeners]
            rests = self.rest_until and self.now <= self.limit(self.rest_until, 0)
            may_wait = self.full() or rests
            self.must(may_wait or all(watched), "nobody accepts newcomers any more")
            self.must(not (self.full() and any(watched)), "it is full, and wants more")
        for client in self.open():
            client.check()
        self.check_times()

    def limit(self, since, seconds):
        """Return when so many seconds are over, at the latest."""
        lost = sum(end - start for start, end in self.pauses if start >= since)
        resumed = self.pauses[-1][1] if self.pauses else 0
        return max(since + seconds + lost, resumed) + LATE

    def check_times(self):
        """No wait is longer than promised."""

        def within(seconds, since, promise):
            self.must(self.now <= self.limit(since, seconds), promise)

        if self.closed is not None:
            within(-LATE, self.closed, "close() does not end it at once")
        for client in self.open():
            within(LINGER, client.doomed, "an end takes longer than 5 s")
            if client.ended is not None and not client.owed():
                quiet = max(client.ended, client.moved, client.acknowledged())
                within(MOMENT, quiet, "it waits too long for a client to hang up")
            elif client.doomed == NEVER and client.owed():  # The end cannot be seen.
                limit = self.limit(client.moved, self.idle_timeout)
                client.doomed = limit if self.now > limit else NEVER
            elif client.doomed == NEVER:
                within(self.idle_timeout, client.moved, "an idle client is kept")

    def check_end(self):
        """What holds after serve_forever()."""
        must, excused = self.must, self.closed is not None or self.cannot_wait
        must(self.stopped is not None or excused, "serve_forever() returns by itself")
        must(all(s.closed for s in self.sockets), "a socket is left open")
        must(self.selector.closed, "the selector is left open")
        if not (excused or self.shortages or self.was_full):
            missed = [s for s in self.waiting() if s.queue[0][2] < self.stopped]
            must(not missed, "newcomers who came before the stop are left out")
        texts = [text for _, text in self.log]
        for client in self.accepted:
            whole = client.sent == client.rule(len(client.stream))
            may_lack = excused or self.early or client.may_lack()
            must(whole or may_lack, "the answer is not whole")
            counts = f"{client.sent} bytes echoed, {client.read - client.sent} dropped"
            line = rf"{re.escape(client.name)} disconnected: .+, {counts}"
            logged = sum(bool(re.fullmatch(line, text)) for text in texts)
            must(logged == 1, "the log does not tell of an end and its bytes")
        warned = sum(n == logging.WARNING and "LF" not in s for n, s in self.log)
        must(warned == self.shortages, "not one warning for each pause of accepting")


class Socket:
    """What all simulated sockets have in common."""

    def __init__(self, name="wake"):
        self.kernel, self.label = Kernel.current, name
        self.blocking, self.closed, self.was_shut = True, False, False
        self.number, self.options = len(self.kernel.sockets), {}
        self.kernel.sockets.append(self)

    def begin_call(self):
        """Check what holds for each call, and that it was not left out."""
        self.kernel.must(not self.closed, "a closed socket is used")
        self.kernel.must(not self.blocking, "a call can block")
        self.kernel.told.discard(self)

    def setblocking(self, flag):
        self.blocking = flag

    def fileno(self):
        return -1 if self.closed else 5000 + self.number

    def setsockopt(self, level, name, value):
        self.options[level, name] = value

    def recv_into(self, buffer, size=0, flags=0):
        data = self.recv(size or len(buffer), flags)
        buffer[: len(data)] = data
        return len(data)

    def shutdown(self, how):
        if self.closed:
            raise error_of(errno.EBADF)
        self.was_shut = True

    def close(self):
        is_watched = self in getattr(self.kernel.selector, "keys", ())
        self.kernel.must(not is_watched, "a socket is closed before it is unregistered")
        self.kernel.note(None, "close", self.label)
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Wake(Socket):
    """Either end of the socket pair."""

    def is_ready(self, event):
        return self.kernel.wakes > 0

    def send(self, data, flags=0):
        if self.closed:
            raise error_of(errno.EBADF)
        self.begin_call()
        self.kernel.wakes += len(data)
        return len(data)

    def recv(self, size, flags=0):
        self.begin_call()
        count, self.kernel.wakes = self.kernel.wakes, 0
        return b"\0" * count


class Listener(Socket):
    rest_until = 0.0

    def __init__(self, family=socket.AF_INET, *_, **__):
        super().__init__("listener")
        if family == socket.AF_INET6 and self.kernel.no_ipv6:
            self.closed = True
            raise error_of(self.kernel.no_ipv6)

    def bind(self, address):
        self.address = (address[0], address[1] or 12321, *address[2:])

    def listen(self, backlog=None):
        """Begin with the clients that come here: they take turns."""
        kernel, number = self.kernel, len(self.kernel.listeners)
        hosts = len(kernel.hosts or ()) or 1
        mine = [s for s in enumerate(kernel.streams) if s[0] % hosts == number]
        self.queue = [(*s, kernel.now) for s in mine]
        kernel.listeners.append(self)

    def getsockname(self):
        return self.address

    def is_ready(self, event):
        return bool(self.queue) and self.queue[0][2] <= self.kernel.now

    def fail(self, error):
        if error not in PASSING:
            # Another listener may be tried in the same turn: one warning for both.
            self.kernel.shortages += self.kernel.now >= self.kernel.rest_until
            self.rest_until = self.kernel.rest_until = self.kernel.now + 1
            self.kernel.progress()

    def accept(self):
        kernel = self.kernel
        try:
            self.begin_call()
            rested = kernel.now >= self.rest_until or kernel.stopped is not None
            kernel.must(rested, "accepting does not pause")
            kernel.must(not kernel.full(), "more clients than --max-clients are in")
            if not self.is_ready(READ):
                raise error_of(AGAIN)
            kernel.decide(self, [None], errors=(*PASSING, *LASTING))
        except Exception as error:
            kernel.note(error, "accept", self.label)
            raise
        kernel.newcomers += 1
        few = kernel.stopped is not None or kernel.newcomers <= kernel.most_newcomers
        kernel.must(few, "newcomers delay the other clients")
        number, stream, _ = self.queue.pop(0)
        if self.queue:
            comes = kernel.now + kernel.decide(self, [0], DELAYS)
            self.queue[0] = (*self.queue[0][:2], max(comes, self.queue[0][2]))
        client = Connection(self, number, stream)
        kernel.note(client.port, "accept", self.label)
        if kernel.stopped is not None:
            kernel.was_full = kernel.was_full or kernel.full()
        kernel.progress()
        return client, (self.address[0], client.port, *self.address[2:])


class Connection(Socket):
    """The server's end of a connection, and what has gone through it."""

    def __init__(self, listener, number, stream):
        self.port = 40000 + number
        super().__init__(self.port)
        host, kernel = getnameinfo(listener.address, ~0)[0], self.kernel
        self.name = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.options = dict(listener.options)
        self.gaps, self.stream = [], bytearray()  # gaps: a position, and seconds
        for piece in [stream] if isinstance(stream, bytes) else stream:
            if isinstance(piece, bytes):
                self.stream += piece
            else:
                self.gaps.append((len(self.stream), piece))
        self.stream = bytes(self.stream)
        self.terminator = b"\n" if kernel.limits.get("lf") else b"\r\n"
        self.max_line = kernel.limits.get("max_line", 1 << 20)
        self.ends = ends_of(self.stream, self.terminator, self.max_line)
        self.read = self.heard = self.sent = 0  # bytes; heard: before the server's EOF
        self.read_turn, self.accepted_turn = 0, kernel.turn
        self.arrives = self.room_at = self.moved = kernel.now
        self.leaves = kernel.decide(self, [kernel.leaves], [*DELAYS, NEVER])
        self.acks = kernel.decide(self, [kernel.acks], DELAYS)
        self.ended = None  # when the server sent EOF
        self.idle_since = NEVER  # since when it may be ended as idle
        # Since when the contract ends the connection:
        self.doomed = NEVER if kernel.stopped is None else kernel.now
        self.failed = self.gone = self.hung_up = self.is_cut = False
        kernel.accepted.append(self)

    def rule(self, count):
        """Return how many bytes of the first `count` come back."""
        return self.ends[bisect.bisect_right(self.ends, count) - 1]

    def owed(self):
        return self.rule(self.heard) - self.sent

    def unfinished(self):
        return self.heard - self.rule(self.heard)

    def is_too_long(self):
        return self.unfinished() >= self.max_line + len(self.terminator)

    def acknowledged(self):
        can_be_known = sys.platform == "linux"
        return self.ended + (self.acks if can_be_known else 0)

    def had_linger(self):
        return self.kernel.now >= min(self.doomed, self.idle_since) + LINGER

    def may_lack(self):
        """Tell if the client need not have the whole answer."""
        return self.failed or self.is_cut or self.idle_since < self.kernel.now

    def moments(self):
        """Return from when on it is ready to read, and to write."""
        leaves = self.arrives
        if self.read == len(self.stream) and self.leaves != "half-closes":
            leaves = NEVER if self.ended is None else self.ended + self.leaves
        return max(self.arrives, leaves), self.room_at

    def is_ready(self, event):
        moments = self.moments()
        events = [READ, WRITE]
        ready = [
            t for e, t in zip(events, moments) if event & e and t <= self.kernel.now
        ]
        return self.gone or bool(ready)

    def fail(self, error):
        self.failed = self.failed or error not in PASSING
        self.kernel.progress()

    def check(self):
        """What holds whenever the server waits."""
        must, key = self.kernel.must, self.kernel.selector.keys.get(self)
        must(not self.failed, "a connection that has failed is kept")
        must(key, "it does not wait for a client")
        if self.owed():
            whole = self.sent in self.ends
            promise = "a line that is complete" if whole else "the rest of a line"
            must(key.events == WRITE, f"{promise} is not sent")
        must(self.owed() or key.events == READ, "it waits for room, and owes nothing")
        ends = self.ended is not None or self.owed()
        must(ends or not self.is_too_long(), "a line that is too long ends nothing")

    def recv(self, size, flags=0):
        try:
            count = self.receive(size)
        except Exception as error:
            self.kernel.note(error, "recv", self.port)
            raise
        data = self.stream[self.read - count : self.read]
        self.kernel.note(data, "recv", self.port)
        return data

    def receive(self, size):
        kernel = self.kernel
        self.begin_call()
        kernel.must(time.process_time() < kernel.cpu, "it takes quadratic time")
        kernel.must(size > 0, "it asks for 0 bytes, which looks like EOF")
        kernel.must(not self.owed(), "it reads from a client that it owes bytes")
        kernel.must(self.read_turn < kernel.turn, "it reads twice in a turn")
        self.read_turn = kernel.turn
        if self.gone or not self.is_ready(READ):
            self.failed = self.failed or self.gone
            raise error_of(RESET if self.gone else AGAIN)
        edge = self.gaps[0][0] if self.gaps else len(self.stream)
        counts = range(min(edge - self.read, size), 0, -1) or [0]
        count = kernel.decide(self, counts, errors=(AGAIN, RESET, MemoryError))
        self.read += count
        if self.gaps and self.read == edge:
            self.arrives = kernel.now + self.gaps.pop(0)[1]
        elif self.read < len(self.stream):
            self.arrives = kernel.now + kernel.decide(self, [0], DELAYS)
        self.hung_up = self.hung_up or not count
        self.moved = kernel.now if count else self.moved
        if self.ended is None:
            self.heard = self.read
        if self.is_too_long():
            self.doomed = min(self.doomed, kernel.now)
        kernel.progress()
        return count

    def send(self, data, flags=0):
        data = bytes(data)
        try:
            count = self.take(data)
        except Exception as error:
            self.kernel.note(error, "send", self.port, data)
            raise
        self.kernel.note(count, "send", self.port, data)
        return count

    def take(self, data):
        kernel, told = self.kernel, self in self.kernel.told
        self.begin_call()
        owed = self.stream[self.sent : self.rule(self.heard)]
        kernel.must(data and owed.startswith(data), "it sends what it does not owe")
        if self.gone or self.room_at > kernel.now:
            self.failed = self.failed or self.gone
            raise error_of(errno.EPIPE if self.gone else AGAIN)
        if kernel.room and not self.sent:
            count, gap = kernel.room
        else:
            # Who was reported as ready has room for a byte; another may have none.
            counts = range(len(data), 0 if told else -1, -1)
            errors = (RESET, MemoryError, AGAIN)[: 2 + told]
            count = kernel.decide(self, counts, errors=errors)
            gap = kernel.decide(self, [0], DELAYS) if count < len(data) else 0
        self.room_at = kernel.now + gap
        if not count:
            raise error_of(AGAIN)
        self.sent, self.moved = self.sent + count, kernel.now
        kernel.progress()
        return count

    def getsockopt(self, level, name, size=0):
        if name != getattr(socket, "TCP_INFO", None):
            return 0
        state = 1 if self.ended is None else 5
        if self.ended is not None and self.kernel.now < self.ended + self.acks:
            state = 4  # TCP_FIN_WAIT1: the EOF is not acknowledged yet.
        return bytes([state]).ljust(size, b"\0")

    def shutdown(self, how):
        super().shutdown(how)
        if self.ended is None:
            self.end(how)
        self.kernel.note("ENOTCONN" if self.gone else None, "shutdown", self.port)
        if self.gone:
            raise error_of(errno.ENOTCONN)

    def end(self, how):
        """Send EOF."""
        kernel, must = self.kernel, self.kernel.must
        if not (self.failed or kernel.closed is not None or kernel.cannot_wait):
            self.is_cut = self.had_linger()
            must(not self.owed() or self.is_cut, "EOF comes before bytes that are owed")
            stops = kernel.stopped is not None and kernel.turn > kernel.stopped_turn
            idle, long = (
                self.idle_since <= kernel.now,
                self.unfinished() > self.max_line,
            )
            reason = self.hung_up or stops or idle or long
            must(reason, "it ends a connection too early, or for no reason")
            has_eof = how == socket.SHUT_WR or self.hung_up or self.is_cut
            must(has_eof, "a client gets no EOF before its connection is closed")
        self.ended = kernel.now
        self.doomed = min(self.doomed, self.ended)
        if len(kernel.streams) == 1 and kernel.faults:
            self.gone = kernel.decide(self, [False, True])
            kernel.faults -= self.gone

    def close(self):
        kernel, must = self.kernel, self.kernel.must
        excused = self.failed or self.hung_up or self.is_cut or self.closed
        if not (excused or kernel.cannot_wait or kernel.closed is not None):
            must(self.ended is not None, "a connection is closed without EOF")
            quiet = max(self.ended, self.moved) + MOMENT
            is_silent = kernel.now >= max(quiet, self.acknowledged())
            must(is_silent or self.had_linger(), "a client had no time to hang up")
        must(self.was_shut, "closed without shutdown(): a forked child holds it open")
        super().close()


def ends_of(stream, terminator, max_line):
    """Return 0, and where each line ends that comes back."""
    lines = stream.split(terminator)[:-1]
    fitting = itertools.takewhile(lambda line: len(line) <= max_line, lines)
    lengths = (len(line) + len(terminator) for line in fitting)
    return [0, *itertools.accumulate(lengths)]


class Selector:
    label, closed = "selector", False

    def __init__(self):
        self.kernel, self.keys = Kernel.current, {}
        self.kernel.selector = self

    def register(self, sock, events, data=None):
        self.kernel.must(not sock.closed, "a closed socket is registered")
        self.kernel.must(sock not in self.keys, "a socket is registered twice")
        if not isinstance(sock, Wake):
            self.kernel.note(None, "register", sock.label)
            self.kernel.decide(sock, [None], errors=(NO_MEMORY,))
        self.keys[sock] = selectors.SelectorKey(sock, sock.fileno(), events, data)

    def unregister(self, sock):
        self.keys.pop(sock)
        self.kernel.note(None, "unregister", sock.label)

    def modify(self, sock, events, data=None):
        key = self.keys.pop(sock)  # As in selectors: if it fails, it is unregistered.
        self.kernel.decide(sock, [None], errors=(NO_MEMORY,))
        self.keys[sock] = key._replace(events=events, data=data)

    def fail(self, error):
        self.kernel.cannot_wait = True

    def select(self, timeout=None):
        kernel, asked = self.kernel, self.kernel.now
        kernel.check_turn()
        if not self.ready():
            kernel.pass_time(timeout)
        ready = self.ready()
        # Bit by bit, who of them is ready by now:
        subsets = range((1 << len(ready)) - 1, 0, -1) if len(ready) < 7 else [-1]
        chosen = kernel.decide(self, subsets or [0], errors=(errno.EPERM,))
        ready = [key for bit, key in enumerate(ready) if chosen >> bit & 1]
        told = [key.fileobj for key in ready]
        kernel.note([s.label for s in told], "select", timeout)
        pause = kernel.decide(self, [0], [7.0])
        if pause:
            kernel.pauses.append((kernel.now, kernel.now + pause))
            kernel.now += pause
        kernel.told = {s for s in told if not isinstance(s, Listener)}
        kernel.most_newcomers = max(100, len(ready))
        for client in kernel.open():
            idle_since = client.moved + kernel.idle_timeout
            if asked >= idle_since and client not in kernel.told:
                client.idle_since = min(client.idle_since, idle_since)
        return [(key, key.events) for key in ready]

    def ready(self):
        keys = sorted(self.keys.values(), key=lambda key: key.fileobj.number)
        return [key for key in keys if key.fileobj.is_ready(key.events)]

    def close(self):
        self.keys.clear()
        self.closed = True


# ---- The seam ------------------------------------------------------------------------


def copy_of(name, **replaced):
    """Return a copy of a module in which some things are replaced."""
    copy = types.ModuleType(name)
    vars(copy).update({**vars(importlib.import_module(name)), **replaced})
    return copy


def load_echo(*modules):
    """Load a fresh echo.py, for which these modules are the system."""
    spec = importlib.util.spec_from_file_location("echo", SCRIPT)
    fresh = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setitem(sys.modules, module.__name__, module)
        spec.loader.exec_module(fresh)
    return fresh


def create_server(address, *, family=socket.AF_INET, backlog=None, **_):
    listener = Listener(family)
    listener.bind(address)
    listener.listen(backlog)
    return listener


def getaddrinfo(host, port, *_, **__):
    if host == "localhost":
        return [*getaddrinfo("::1", port), *getaddrinfo("127.0.0.1", port)]
    number, _, scope = host.partition("%")
    if ":" in host:
        address = number, port, 0, 7 if scope else 0
        return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", address)]
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]


def getnameinfo(address, flags):
    is_numeric = flags & socket.NI_NUMERICHOST and flags & socket.NI_NUMERICSERV
    Kernel.current.must(is_numeric, "a name is looked up while clients wait")
    scope = "%eth0" if address[3:] and address[3] else ""
    return address[0] + scope, str(address[1])


@functools.lru_cache(maxsize=None)
def simulated_echo(selector):
    """Return a fresh echo.py that runs in the simulation."""
    sockets = {
        "socket": Listener,
        "create_server": create_server,
        "socketpair": lambda *_: (Wake(), Wake()),
        "getaddrinfo": getaddrinfo,
        "getnameinfo": getnameinfo,
        "getfqdn": lambda *_: getnameinfo(("", 0), 0),  # It is a name's look-up.
        "gethostbyaddr": lambda *_: getnameinfo(("", 0), 0),
    }
    kinds = {"SelectSelector": type("SelectSelector", (Selector,), {})}
    kinds["DefaultSelector"] = kinds.get(selector, Selector)
    clock = {"monotonic": lambda: Kernel.current.now}
    modules = {"socket": sockets, "selectors": kinds, "time": clock}
    return load_echo(*(copy_of(name, **fakes) for name, fakes in modules.items()))


# ---- How a failure reads -------------------------------------------------------------


def shown(value):
    """Return a value as strace would: long bytes are cut."""
    if isinstance(value, OSError):
        return f"-1 {errno.errorcode[value.errno]}"
    if isinstance(value, bytes) and len(value) > 24:
        return f"{value[:16]!r}... ({len(value)} bytes)"
    return repr(value)


def transcript(calls):
    """Return calls as strace would print them, with the time where it moves."""
    now = calls[0][0] if calls else 0
    for moment, name, arguments, result in calls:
        if moment > now + 0.001:
            yield f"[{moment - now:.3g} s later]"
        now = moment
        called = f"{name}({', '.join(map(shown, arguments))})"
        yield called if result is None else f"{called} = {shown(result)}"


def report(kernel, streams, decisions, setup):
    """Return the broken promise, how to replay it, and the last thirty calls."""
    keywords = "".join(f", {name}={value!r}" for name, value in setup.items())
    again = textwrap.wrap(f"replay({streams}, {decisions}{keywords})", 88)
    again = again if len(again) < 6 else [*again[:5], "..."]
    calls = textwrap.wrap("; ".join(transcript(kernel.calls)), 88)
    return "\n".join([kernel.violation, *again, "The last calls:", *calls[-11:]])


def shrink(streams, decisions, setup, violation):
    """Return fewer decisions that break the same promise."""
    for width in 64, 16, 4, 1:
        for i in range(len(decisions) // width * width, -1, -width):
            fewer = [*decisions[:i], *decisions[i + width :]]
            if Kernel(streams, Choices(fewer), **setup).run().violation == violation:
                decisions = fewer
    return decisions


def replay(streams, decisions=(), draw=lambda common, rare: 0, **setup):
    """Run one schedule. What a failure prints runs it again."""
    choices = Choices(decisions, draw)
    kernel = Kernel(streams, choices, **setup).run()
    if kernel.violation:
        used = choices.decisions[: len(choices.widths)]
        used = shrink(streams, used, setup, kernel.violation)
        kernel = Kernel(streams, Choices(used), **setup).run()
        pytest.fail(report(kernel, streams, used, setup), pytrace=False)
    return kernel


# ---- The schedules -------------------------------------------------------------------


def all_streams(longest):
    """Return every stream of CR, LF and one letter up to this length."""
    lengths = range(longest + 1)
    return [bytes(s) for n in lengths for s in itertools.product(b"\r\nx", repeat=n)]


STOP, CLOSE, FEW = ("shutdown",), ("close",), [b"", b"x", b"\r\n"]
BOTH = {"hosts": ("127.0.0.1", "::1")}
STAYS, ONE = {"leaves": 9}, {"max_clients": 1}
EVERY = {  # streams, of one client each or of two, and a setup: thousands of schedules
    "lines that end with CR LF": [(s, {}) for s in all_streams(4)],
    "lines that end with LF": [(s, {"lf": True}) for s in all_streams(3)],
    "a call that fails": [(s, {"faults": 1}) for s in [*all_streams(2), b"x\r\n"]],
    "two calls that fail": [(s, {"faults": 2}) for s in [b"", b"x"]],
    "shutdown at any time": [(s, {"stops": STOP}) for s in all_streams(2)],
    "close at any time": [(s, {"stops": CLOSE}) for s in all_streams(2)],
    "shutdown and close": [(s, {"stops": STOP + CLOSE, **STAYS}) for s in FEW[:2]],
    "a client that stays": [(s, {"stops": STOP, **STAYS}) for s in FEW],
    "a stop that fails": [(s, {"stops": STOP, "faults": 1}) for s in [b"", b"x"]],
    "too long": [(s, {"max_line": 1}) for s in (b"\r\nxx\r\n", b"\r\nxxxx", b"xxxxxx")],
    "too long, and a fault": [(b"xxx", {"max_line": 1, "faults": 1})],
    "two clients": [([b"x", b"\r\n"], {}), ([b"x", b""], {"stops": STOP})],
    "two clients and a fault": [([b"x", b""], {"faults": 1})],
    "one client at a time": [([b"", b"\r\n"], {"faults": 1, **ONE})],
    "a full server stops": [([b"", b""], {"stops": STOP, **ONE, **STAYS})],
    "two listeners": [([b"x", b"\r\n"], BOTH), ([b"", b""], {"stops": STOP, **BOTH})],
    "two listeners and a fault": [([b"", b""], {"faults": 1, **BOTH})],
}


@pytest.mark.parametrize("group", EVERY, ids=dashed)
def test_every_schedule_of_every_short_stream(group):
    for streams, setup in EVERY[group]:
        streams = [streams] if isinstance(streams, bytes) else streams
        decisions = replay(streams, **setup).choices.following()
        while decisions:
            decisions = replay(streams, decisions, **setup).choices.following()


def random_schedule(seed):
    """Return streams, a way to draw, and a setup."""

    def draw(common, rare):
        is_rare = rare and chance.random() < rarely
        return common + chance.randrange(rare) if is_rare else chance.randrange(common)

    chance = random.Random(seed)
    rarely = chance.choice([0.02, 0.1, 0.3])
    pieces = [b"\r\n", b"\r\n", b"\r", b"\n", b"a", b"b", b"c", b"d"]
    size = chance.choice([10, 40, 150])
    streams = [chance.choices(pieces, k=chance.randrange(size)) for _ in range(3)]
    setup = {
        "delays": chance.random() < 0.9,
        "faults": chance.choice([0, 0, 1, 3]),
        "stops": chance.choice([(), STOP, STOP, CLOSE, STOP + CLOSE]),
        "leaves": chance.choice(["half-closes", "half-closes", 0.3, 2, 7, 60]),
    }
    limits = {
        "lf": True,
        "max_line": chance.choice([1, 3, 6]),
        "max_clients": chance.choice([1, 2]),
        "idle_timeout": chance.choice([0.4, 1, 3, 20]),
        **BOTH,
    }
    setup.update({k: v for k, v in limits.items() if chance.random() < 0.4})
    return list(map(b"".join, streams)), draw, setup


@pytest.mark.parametrize("first", range(0, 2000, 100), ids="seeds-from-{}".format)
def test_random_schedules_of_long_streams(first):
    for seed in range(first, first + 100):
        streams, draw, setup = random_schedule(seed)
        replay(streams, (), draw, **setup)


def test_a_standstill_after_a_failure_to_watch_the_listeners_shuts_nobody_out():
    streams, draw, setup = random_schedule(5567)
    replay(streams, (), draw, **setup)


STEADY = [piece for i in range(12) for piece in (b"x", 0.3)]
LATER, STUCK = {"leaves": 60}, {"room": (1, NEVER)}
TIMES = {  # Each time is checked from both sides: not before, not after.
    "a silent client is idle": ([b"x"], {"idle_timeout": 3, **LATER}),
    "who sends is not idle": ([STEADY], {"idle_timeout": 0.6}),
    "an idle client may read": ([b"xx\r\n"], {"idle_timeout": 2, "room": (1, 5)}),
    "a stop lets a client leave": ([b"x"], {"at": {"shutdown": 60}, **LATER}),
    "a stop pays first": ([b"xx\r\n"], {"room": (1, 6), "at": {"shutdown": 2}}),
    "a stop begins no end anew": (
        [b"\r\nxxxxx"],
        {"max_line": 3, "at": {"shutdown": 4}, **STUCK},
    ),
    "who sends after a stop is not silent": (
        [STEADY],
        {"at": {"shutdown": 1}, **LATER},
    ),
    "who sends after its end is not silent": (
        [[b"xxxxx", 0.3, *STEADY]],
        {"max_line": 3, **LATER},
    ),
    "an EOF is acknowledged late": (
        [b"x"],
        {"acks": 2, "at": {"shutdown": 1}, **LATER},
    ),
    "or never": ([b"x"], {"acks": NEVER, "at": {"shutdown": 1}, **LATER}),
    "close pays nobody": ([b"xx\r\n"], {"at": {"shutdown": 2, "close": 3}, **STUCK}),
    "a stop answers all": ([b"a\r\n"] * 4, {"at": {"shutdown": 0.001}, **BOTH}),
    "a full server stops": ([b"x", b"x"], {"leaves": 1, "at": {"shutdown": 2}, **ONE}),
}


@pytest.mark.parametrize("name", TIMES, ids=dashed)
def test_no_end_comes_earlier_or_later_than_promised(name):
    streams, setup = TIMES[name]
    replay(streams, **setup)


def test_a_stop_answers_128_kib_of_what_a_client_has_sent():
    streams = [[b"x\r\n", 2, LINE * 128]]
    kernel = replay(streams, at={"shutdown": 2}, leaves=60)
    assert kernel.accepted[0].sent == 3 + (128 << 10)


@pytest.mark.parametrize(
    ("kind", "limits", "most"),
    [
        ("DefaultSelector", {}, 1000),
        ("SelectSelector", {}, 500),
        ("SelectSelector", {"max_clients": 600}, 500),
        ("SelectSelector", {"max_clients": 2}, 2),
    ],
    ids=["by-default", "with-select", "more-than-select-can", "fewer"],
)
def test_so_many_clients_are_served_and_the_next_one_waits(kind, limits, most):
    setup = {"kind": kind, "most": most, "leaves": 60, **limits}
    assert len(replay([b"x\r\n"] * 1001, **setup).accepted) == most


def test_newcomers_wait_no_longer_because_others_are_busy():
    busy = [[p for _ in range(40) for p in (b"x\r\n", 0.001)] for _ in range(100)]
    kernel = replay([*busy, *[b"x\r\n"] * 100], leaves=60)
    assert kernel.accepted[-1].accepted_turn < 40


@pytest.mark.parametrize("begins", [b"\n", b"x"], ids=["LF-first", "without-LF"])
def test_a_long_line_in_small_pieces_is_searched_once(begins):
    pieces = [p for _ in range(7000) for p in (b"x" * 8192, 0)]
    cpu = time.process_time() + 3  # seconds; twice that if it is searched repeatedly
    kernel = replay([[begins, 0, *pieces, b"\r\n"]], max_line=1 << 26, cpu=cpu)
    assert kernel.accepted[0].sent == 3 + (7000 << 13)


OPTIONS = {  # of accepted sockets; macOS has another name for the first
    "TCP_KEEPALIVE": [200],
    "TCP_KEEPIDLE": [200],
    "TCP_KEEPINTVL": range(1, 134),
    "TCP_KEEPCNT": range(1, 4),  # So it is noticed within ten minutes.
    "SO_KEEPALIVE": [1],
    "SO_OOBINLINE": [1],
    "TCP_NODELAY": [1],
    "TCP_NOTSENT_LOWAT": range(1 << 16, 1 << 18),
}


@pytest.mark.parametrize("name", [name for name in OPTIONS if hasattr(socket, name)])
def test_accepted_sockets_have_their_options_for_ipv4_and_for_ipv6(name):
    level = socket.SOL_SOCKET if name[:3] == "SO_" else socket.IPPROTO_TCP
    clients = replay([b"x\r\n", b"x\r\n"], **BOTH).accepted
    values = [c.options.get((level, getattr(socket, name))) for c in clients]
    assert [value in OPTIONS[name] for value in values] == [True, True], values


def test_an_address_keeps_its_scope():
    kernel = replay([b"x\r\n"], hosts=("fe80::1%eth0",))
    assert kernel.listeners[0].address == ("fe80::1", 12321, 0, 7)
    assert kernel.server.addresses == [("fe80::1%eth0", 12321)]


NO_IPV6 = [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT]


@pytest.mark.parametrize("number", NO_IPV6, ids=errno.errorcode.get)
def test_ipv6_may_be_missing_by_default_and_for_a_name_but_not_as_an_address(number):
    for hosts in None, "localhost", ["127.0.0.1", "localhost"]:
        kernel = replay([b"x\r\n"], hosts=hosts, no_ipv6=number)
        assert kernel.server.addresses == [("127.0.0.1", 12321)]
    for hosts in ["127.0.0.1", "::1"], ["::1", "127.0.0.1"], ["localhost", "::1"]:
        kernel = Kernel([], Choices(), hosts=hosts, no_ipv6=number).run()
        assert kernel.violation.startswith("it dies: OSError"), hosts
        assert all(sock.closed for sock in kernel.sockets)


@pytest.mark.parametrize("lf", [False, True], ids=["CR-LF", "LF"])
def test_verbose_shows_each_line_also_one_that_is_owed(lf):
    setup = {"room": (1, 2.0), "level": logging.DEBUG, "lf": lf}
    log = replay([b"a\r\nb\nc\r\nd"], **setup).log
    lines = [b"a\r", b"b", b"c\r"] if lf else [b"a", b"b\nc"]
    shown = [text.partition(" ")[2] for n, text in log if n == logging.DEBUG]
    assert shown == list(map(repr, lines))


@needs_signals
@pytest.mark.parametrize("clients", [100, 5000, 20000])
def test_a_limit_of_descriptors_that_could_not_be_raised_is_told(
    clients, monkeypatch, log
):
    def set_limit(_, pair):  # as macOS does
        if pair[0] > 10240:
            raise ValueError("current limit exceeds maximum limit")
        limits[0] = pair[0]

    limits = [256]
    fakes = {"getrlimit": lambda _: (limits[0], 1 << 60), "setrlimit": set_limit}
    fake = copy_of("resource", **fakes)
    monkeypatch.setitem(sys.modules, "resource", fake)
    load_echo(fake).raise_descriptor_limit(clients)
    told = log.texts(f"only {limits[0]} descriptors for {clients} clients: raise the")
    assert limits[0] >= 256
    assert len(told) == (limits[0] < clients)
