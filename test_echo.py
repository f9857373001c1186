"""What echo.py promises, as a specification that runs.

Part one says what is promised, over real sockets and processes. It knows the public
names of echo.py, and the script. In part two, a simulated kernel answers in any way
that a kernel may, and lets time pass as it likes.
"""

import concurrent.futures
import contextlib
import errno
import functools
import gc
import importlib.util
import itertools
import logging
import os
import pathlib
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

import pytest

import echo

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("error")]

SCRIPT = pathlib.Path(echo.__file__).resolve()
CODE = SCRIPT.read_text(encoding="utf-8")
README = SCRIPT.with_name("README.md").read_text(encoding="utf-8")
NEVER, NAN = float("inf"), float("nan")
PATIENCE = 10  # seconds that a socket, a process or a thread may take
LINE = b"x" * 1022 + b"\r\n"
FLOOD = memoryview(LINE * (1 << 16))  # 64 MiB: more than the kernel holds for anybody
BUFFERED = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
SIGNALS = [n for n in signal.Signals if n.name in ("SIGINT", "SIGTERM", "SIGBREAK")]
LOGGER = logging.getLogger("echo")
LOGGER.propagate = False  # Otherwise pytest would keep it, too.


def can_listen(host, port=0):
    with contextlib.suppress(OSError):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
        return True
    return False


LOOPBACKS = [host for host in ("127.0.0.1", "::1") if can_listen(host)]
skip_if = pytest.mark.skipif
needs_ipv6 = skip_if("::1" not in LOOPBACKS, reason="no IPv6 here")
needs_signals = skip_if(os.name == "nt", reason="on Windows, a signal kills")
each_host = pytest.mark.parametrize("host", LOOPBACKS)
both_ends = pytest.mark.parametrize("end", [b"\r\n", b"\n"], ids=["CR-LF", "LF"])


def connect(server, number=0):
    """Connect to an address, or to one of a server's or a script's."""
    addresses = [server] if isinstance(server, tuple) else server.addresses
    sock = socket.create_connection(addresses[number % len(addresses)], PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


@contextlib.contextmanager
def connected(server, size):
    """Connect so many clients, to one address after the other."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(server, number)) for number in range(size)]


def expect(sock, expected, eof=False, pause=0):
    """Check that just these bytes come, and perhaps that EOF follows them."""
    __tracebackhide__ = True
    got = bytearray()
    while (eof or len(got) < len(expected)) and (chunk := sock.recv(1 << 14)):
        got += chunk
        time.sleep(pause)
    if got != expected:
        pairs = enumerate(itertools.zip_longest(got, expected))
        place = next(i for i, (a, b) in pairs if a != b)
        came, right = (bytes(b[place : place + 16]) for b in (got, expected))
        lengths = f"{len(got)} bytes came, {len(expected)} are right"
        pytest.fail(f"{lengths}; from byte {place} on: {came!r}, right is {right!r}")


def ask(sock, lines=b"are you there?\r\n", answer=None, eof=False):
    """Send lines. Check that the answer comes: by default, the lines."""
    __tracebackhide__ = True
    sock.sendall(lines)
    expect(sock, lines if answer is None else answer, eof)


def use(address, times):
    """Let one client after the other ask."""
    for _ in range(times):
        with connect(address) as client:
            ask(client, LINE + b"x" * 1000, LINE)


def flood(sock):
    """Send lines, read nothing, until no more is taken. Return what was taken."""
    sock.settimeout(0.2)
    sent = 0
    with contextlib.suppress(socket.timeout):
        while sent < len(FLOOD):
            sent += sock.send(FLOOD[sent : sent + (1 << 16)])
    sock.settimeout(PATIENCE)
    assert sent < len(FLOOD), "nothing made it wait"
    return bytes(FLOOD[:sent])


def is_refused(address):
    with socket.socket() as sock:
        sock.settimeout(PATIENCE)
        return sock.connect_ex(address) == errno.ECONNREFUSED


def as_logged(host, port, *_):
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def takes(at_least, at_most):
    """Check how many seconds a block takes."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert at_least <= took < at_most, f"it took {took:.1f} s"


def eventually(condition):
    """Wait until something that cannot be waited for is true."""
    __tracebackhide__ = True
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("it never happened")
        time.sleep(0.01)


class Log(logging.Handler):
    """Keeps pairs of a level and a text."""

    def emit(self, record):
        self.kept.append((record.levelno, record.getMessage()))

    def texts(self, pattern="", level=0):
        return [s for n, s in self.kept if n >= level and re.search(pattern, s)]


@contextlib.contextmanager
def logged(level=logging.INFO):
    """Keep what is logged."""
    handler = Log()
    handler.kept = []
    LOGGER.handlers = [handler]
    LOGGER.setLevel(level)
    yield handler
    LOGGER.handlers = []


@pytest.fixture
def log():
    with logged() as handler:
        yield handler


def in_thread(function):
    """Run a function in a thread; return the future of its result, or of its error."""

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    future = concurrent.futures.Future()
    threading.Thread(target=run, daemon=True).start()
    return future


@pytest.fixture
def start(log):
    """Start servers that run in threads, and stop them."""
    with contextlib.ExitStack() as stack:

        def start(hosts="127.0.0.1", **options):
            server = stack.enter_context(echo.EchoServer(0, hosts, **options))
            server.end = in_thread(server.serve_forever)
            stack.callback(server.end.result, PATIENCE)  # It raises what ended it.
            stack.callback(server.close)
            return server

        yield start


class Script:
    """echo.py as a process; `addresses` are those of its ready lines."""

    def __init__(self, stack, *arguments, ready=True, prefix=(), **options):
        if os.name == "nt" and "-c" not in arguments:
            pytest.skip("a signal ends a process of Windows at once")
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        python = (sys.executable, "-X", "dev", "-W", "error")
        # For so few clients, there are always enough descriptors: no warning comes.
        program = () if "-c" in arguments else (str(SCRIPT), "--max-clients", "100")
        command = [*prefix, *python, *program, *arguments]
        self.process = subprocess.Popen(command, env=BUFFERED, **options)
        stack.enter_context(self.process)
        stack.callback(self.process.kill)
        hosts = (["-b"] if "-b" in arguments else LOOPBACKS) if ready else []
        lines = [self.line() for _ in hosts]
        found = [re.fullmatch(r"listening on \[?(.*?)\]?:(\d+)", s) for s in lines]
        assert all(found), (lines, self.stop())
        self.addresses = [(match[1], int(match[2])) for match in found]

    def line(self):
        line = in_thread(self.process.stdout.readline).result(PATIENCE)
        return line.decode().rstrip()

    def stop(self):
        """Send SIGTERM; return the status, the rest of stdout, and stderr."""
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, (out or b"").decode("ascii").splitlines(), err


@pytest.fixture
def run():
    """Start the script; kill what is left of it at the end."""
    with contextlib.ExitStack() as stack:
        yield functools.partial(Script, stack)


def run_on_free_port(run, *arguments, **options):
    """Start the script, or code; a free port replaces 12321. Return the address too."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    arguments = [text.replace("12321", str(address[1])) for text in arguments]
    script = run(*arguments, ready=False, **options)
    eventually(lambda: not is_refused(address))
    return script, address


def main(*arguments):
    """Call main() in this process, with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["echo.py", *arguments])
        echo.main()


def in_folder(folder, *command, seconds=3 * PATIENCE, **variables):
    """Run a command in a folder; return its status and what it printed."""
    options = {"capture_output": True, "timeout": seconds, "cwd": folder}
    done = subprocess.run(command, env={**BUFFERED, **variables}, **options)
    return done.returncode, (done.stdout + done.stderr).decode().replace("\r\n", "\n")


# PART ONE: WHAT IS PROMISED. First, lines.


def test_a_line_comes_back_as_soon_as_it_is_complete_and_no_part_of_one_before(start):
    with connect(start()) as client:
        client.sendall(b"hel")
        assert not select.select([client], [], [], 0.1)[0]  # Nothing comes for a while.
        ask(client, b"lo\r\nwor", b"hello\r\n")
        ask(client, b"ld\r\n\r\n", b"world\r\n\r\n")


@both_ends
@each_host
def test_a_line_comes_back_byte_for_byte_whatever_it_holds(start, host, end):
    every = bytes(n for n in range(256) if n != 10)
    lines = [every, every[::-1], b"\xff\r\x80\0", b"\r", b"\r\r", b""]
    lines += [b"\n", b"a\n\rb\n\n"] if end == b"\r\n" else []
    stream = b"".join(line + end for line in lines)
    with connect(start(host, lf=end == b"\n")) as client:
        client.sendall(b"urgen")
        client.send(b"t", socket.MSG_OOB)
        ask(client, stream, b"urgent" + stream)


@skip_if(not hasattr(echo, "take_lines"), reason="the framing has another name")
@both_ends
def test_lines_come_back_exactly_however_the_stream_is_cut(end):
    for *letters, i, j in itertools.product(*[b"\r\nx"] * 6, range(7), range(7)):
        stream, inbox, lines = bytes(letters), bytearray(), b""
        for piece in filter(None, (stream[:i], stream[i : i + j], stream[i + j :])):
            taken, inbox = echo.take_lines(inbox, memoryview(piece), end)
            lines += taken
        right = b"".join(line + end for line in stream.split(end)[:-1])
        assert (lines, lines + inbox) == (right, stream), (i, j)


def test_bare_lf_is_explained_once_per_connection_by_a_warning(start, log):
    with connect(start()) as client:
        client.sendall(b"a\n")
        eventually(lambda: log.texts("LF"))
        ask(client, b"\nb\r\n\n", b"a\n\nb\r\n")
        assert not select.select([client], [], [], 0.1)[0]
        (hint,) = log.texts("LF", logging.WARNING)
        assert hint.startswith(f"{as_logged(*client.getsockname())} ")
    assert all(word in hint for word in ("CR LF", "nc -C", "--lf"))


# CLIENTS
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
    if not (selector := getattr(selectors, f"{name}Selector", None)):
        pytest.skip(f"this platform has no {name}Selector")
    monkeypatch.setattr(selectors, "DefaultSelector", selector)
    with connect(start()) as client:
        sent = flood(client)
        client.shutdown(socket.SHUT_WR)
        expect(client, sent[: sent.rfind(b"\n") + 1], eof=True)


@skip_if(not os.path.exists("/proc/self/schedstat"), reason="no /proc/PID/schedstat")
def test_waiting_costs_no_system_call_and_no_cpu(run):
    def is_asleep():
        before = usage.read_text()
        time.sleep(0.5)
        return usage.read_text() == before

    script = run("0")
    usage = pathlib.Path(f"/proc/{script.process.pid}/schedstat")  # CPU time, and runs
    with connected(script, 4) as (silent, half_line, stalled, half_closed):
        ask(silent)
        half_line.sendall(b"hel")
        flood(stalled)
        flood(half_closed)
        half_closed.shutdown(socket.SHUT_WR)
        eventually(is_asleep)


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
    reason = os.strerror(errno.ECONNRESET) if sys.platform == "linux" else r"[\w -]+"
    assert log.texts(rf" disconnected: {reason}, \d+ bytes echoed, \d+ dropped$")


def test_nothing_is_kept_of_what_was_sent_nor_of_a_client_that_has_gone(start):
    tracemalloc = pytest.importorskip("tracemalloc")  # PyPy has none.
    server = start()
    LOGGER.setLevel(logging.WARNING)
    tracemalloc.start()
    for count in 50, 200:  # At the first time, some things are kept for good.
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        use(server, count)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 200 * 200  # bytes


# LIMITS
@both_ends
def test_a_line_may_have_one_mib_and_one_byte_more_is_the_end(start, end):
    line = b"x" * (1 << 20)
    with connect(start(lf=end == b"\n")) as client:
        ask(client, line + end)
        ask(client, b"a" + end + line + b"x" + end + b"b" + end, b"a" + end, eof=True)


def test_a_slow_reader_that_goes_on_sending_gets_all_it_is_owed(start):
    def send():
        with contextlib.suppress(OSError):
            sock.sendall(lines + b"x" * 2002)
            while True:
                sock.sendall(b"late")
                time.sleep(0.001)

    lines = LINE * 3000
    with connect(start(max_line=2000)) as sock:
        sender = in_thread(send)
        expect(sock, lines, eof=True, pause=0.002)
        sock.shutdown(socket.SHUT_RDWR)
        sender.result(PATIENCE)


def test_client_n_plus_one_waits_and_is_served_when_one_leaves(start, log):
    with connected(start(max_clients=2), 3) as (first, second, third):
        third.sendall(b"hello\r\n")
        ask(first)
        ask(second)
        assert len(log.texts(" connected$")) == 2
        first.close()
        expect(third, b"hello\r\n")


def test_select_gets_no_more_clients_than_it_can_watch(monkeypatch):
    monkeypatch.setattr(selectors, "DefaultSelector", selectors.SelectSelector)
    with echo.EchoServer(0) as many, echo.EchoServer(0, max_clients=2) as few:
        assert (many.max_clients, few.max_clients) == (500, 2)


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


def test_the_limit_of_descriptors_is_raised_never_lowered_or_told(log, monkeypatch):
    def set_limit(_, pair):  # as on macOS
        soft, hard = pair
        if soft > 10240 or hard != 1 << 60:
            raise ValueError("current limit exceeds maximum limit")
        limits.append(soft)

    limits, resource = [], pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limits[-1], 1 << 60))
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    for limit, clients, raised in (200, 9, 200), (40, 60, 92), (256, 20000, 256):
        limits.append(limit)
        echo.raise_descriptor_limit(clients)
        assert raised <= limits[-1] <= raised + 100
    assert len(log.texts()) == len(log.texts("^only 256 .* 20000 clients: raise ")) == 1


def test_out_of_descriptors_accepting_rests_and_the_others_are_served(run):
    shell = ("sh", "-c", 'ulimit -n 40; exec "$@"', "sh")
    script = run("-q", "0", "--max-clients", "60", prefix=shell)
    assert script.line().startswith("only 40 descriptors for 60 clients: raise the ")
    with takes(1, 6), connected(script, 60) as clients:
        reason = os.strerror(errno.EMFILE)
        assert script.line() == f"cannot accept: {reason}; retry in 1 s"
        ask(clients[0])
        for client in clients[:30]:
            client.close()
        ask(clients[-1])
    assert script.stop()[::2] == (0, b"")


def test_closing_goes_on_when_a_log_handler_raises(log, monkeypatch):
    server = echo.EchoServer(0, "127.0.0.1")
    end = in_thread(server.serve_forever)
    with connected(server, 3) as clients:
        for client in clients:
            ask(client)
        monkeypatch.delattr(log, "kept")  # Now emit() raises, as pytest's own may.
        server.close()
        assert isinstance(end.exception(PATIENCE), AttributeError)
        for client in clients:
            expect(client, b"", eof=True)
    assert is_refused(server.addresses[0])


def test_a_selector_that_cannot_wait_is_the_end_with_status_1(monkeypatch):
    def select(*_):
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr(selectors.DefaultSelector, "select", select)
    with pytest.raises(SystemExit, match=r"^echo.py: cannot wait .*: not here$"):
        main("-b", "127.0.0.1", "0")


def test_a_client_that_is_gone_is_noticed_within_ten_minutes(monkeypatch):
    def setsockopt(sock, level, name, value):
        options[sock.family, level, name] = value

    options, tcp = {}, {"NODELAY": 1, "NOTSENT_LOWAT": 1 << 18}
    tcp.update(KEEPIDLE=240, KEEPALIVE=240, KEEPINTVL=120, KEEPCNT=3)  # seconds; times
    monkeypatch.setattr(socket.socket, "setsockopt", setsockopt)
    echo.EchoServer(0).close()
    for family in (socket.AF_INET, socket.AF_INET6)[: len(LOOPBACKS)]:
        assert options[family, socket.SOL_SOCKET, socket.SO_KEEPALIVE] == 1
        for name, most in tcp.items():
            if option := getattr(socket, f"TCP_{name}", None):
                assert 0 < options[family, socket.IPPROTO_TCP, option] <= most


# ADDRESSES, AND THE COMMAND LINE
@needs_signals
def test_by_default_it_listens_on_both_loopbacks_on_port_12321(run):
    if not all(can_listen(host, 12321) for host in LOOPBACKS):
        pytest.skip("port 12321 is taken")
    addresses = [(host, 12321) for host in LOOPBACKS]
    with echo.EchoServer() as server:
        assert (server.addresses, server.max_clients) == (addresses, 1000)
    assert run().addresses == addresses


@pytest.mark.parametrize("name", ["EADDRNOTAVAIL", "EAFNOSUPPORT", "EPROTONOSUPPORT"])
def test_ipv6_may_be_missing_and_each_address_is_listened_on_once(name, monkeypatch):
    def bind(sock, address):
        if sock.family == socket.AF_INET6 and names:
            raise error_named(names.pop())
        real(sock, address)

    def getaddrinfo(host, *rest, **options):
        hosts = ("::1", "127.0.0.1") if host == "localhost" else (host,)
        return [found for h in hosts for found in look_up(h, *rest, **options)]

    names, real, look_up = [name] * 99, socket.socket.bind, socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "bind", bind)
    for hosts in [], ["localhost"], [["127.0.0.1", "localhost"]]:
        with echo.EchoServer(0, *hosts) as server:
            assert [host for host, _ in server.addresses] == ["127.0.0.1"]
    for hosts in ["127.0.0.1", "::1"], ["::1", "localhost"], ["localhost", "::1"]:
        with pytest.raises(OSError, match=r"^\[Errno \d+\] cannot listen on \[::1\]:"):
            echo.EchoServer(0, hosts)
    if "::1" in LOOPBACKS:
        names[:] = ["EADDRINUSE"]  # What is free for one may be taken for another.
        with echo.EchoServer(0, ["localhost", "[::1]", "127.0.0.1"]) as server:
            assert sorted(host for host, _ in server.addresses) == LOOPBACKS
            assert len({port for _, port in server.addresses}) == 1


ANSWERS = {  # to arguments that are wrong (with status 2), or in vain (with 1)
    "x": "error: .*port.* 'x'",
    "localhost 8080": "error: .*'localhost'.* -b",
    "-q -v": "error: .*-v/--verbose.* -q/--quiet",
    "65536": "error: .*'65536'.* 65535",
    "--max-clients 1.5": r"error: .*--max-clients.* '1\.5'",
    "--idle-timeout 0": "error: .*--idle-timeout.* '0'",
    "-b ": "error: .*-b/--bind.* ''",
    "-b *": r"error: .*-b/--bind.* '\*'",
    "-b localhost:80": "error: .*-b/--bind.* 'localhost:80'.* port",
    f"-b {'x' * 64}": "error: .*-b/--bind.* '(x{64})'",
    "-b 192.0.2.1 65535": r"cannot listen on 192\.0\.2\.1:65535: [^(]+$",
    "-b no.invalid 7": "cannot listen on no.invalid:7: .+",
    "-b fe80::2 65535": r"cannot listen on \[fe80::2\]:65535: (?!Invalid argument$)",
    "-b fe80::2%1 65535": r"cannot listen on \[fe80::2(%\w+)?\]:65535: [^(]+$",
}


@pytest.mark.parametrize("arguments", ANSWERS, ids=lambda text: text[:24])
def test_arguments_in_vain_are_answered_by_a_message(arguments, capfd):
    with pytest.raises(SystemExit) as exit:
        main(*arguments.split(" "))
    out, err = capfd.readouterr()
    message = (err or f"{exit.value.code}\n").splitlines()[-1]
    assert re.match(f"echo.py: {ANSWERS[arguments]}", message)
    assert (out, exit.value.code == 2) == ("", "error" in message)


def test_a_port_belongs_to_one_server_and_a_failed_one_leaves_nothing(capfd):
    with echo.EchoServer(0, "127.0.0.1") as server:
        port = server.addresses[0][1]
        message = rf" cannot listen on 127.0.0.1:{port}: [^(]+$"
        with pytest.raises(OSError, match=message):
            echo.EchoServer(port, "127.0.0.1")
    socket.create_server(("127.0.0.1", port)).close()
    assert capfd.readouterr() == ("", "")


def test_help_is_enough_by_itself(capsys):
    for option in "--version", "--help":
        with pytest.raises(SystemExit, match=r"^0$"):
            main(option)
    text = " ".join(capsys.readouterr().out.split())
    words = "echo.py 1./--bind ADDRESS/--lf/--max-line BYTES/--max-clients N/--verbose"
    words += "/--quiet/--idle-timeout SECONDS/never/CR LF/12321/127.0.0.1/::1/1048576"
    words += "/1000/nc -C/0.0.0.0/free one/repeated/cut short/not counting"
    assert [word for word in words.split("/") if word not in text] == []


def test_an_older_python_shows_what_it_lacks():
    assert "needs Python 3.8" in re.search(".*:=.*", CODE)[0]  # It is rejected first.
    assert '\n# requires-python = ">=3.8"\n' in CODE


# WHAT IT PRINTS
@each_host
def test_the_log_tells_who_came_and_how_each_connection_ended(run, host):
    script = run("-b", host, "0", "--lf", "--max-line", "5", "--idle-timeout", "1")
    for sent, end in (
        (b"hello\n", "closed by client, 6 bytes echoed, 0 dropped"),
        (b"hello\nhel", "closed by client in mid-line, 6 bytes echoed, 3 dropped"),
        (b"hello\nhello!", "line longer than 5 bytes, 6 bytes echoed, 6 dropped"),
        (b"hello\nhello", "idle for 1 s, 6 bytes echoed, 5 dropped"),
    ):
        with connect(script) as client:
            client.sendall(sent)
            if "client" in end:
                client.shutdown(socket.SHUT_WR)
            expect(client, b"hello\n", eof=True)
            me = as_logged(*client.getsockname())
        assert script.line() == f"{me} connected"
        assert script.line() == f"{me} disconnected: {end}"
    assert script.stop() == (0, [], b"")


def test_verbose_prints_each_line_as_printable_ascii_and_cut_short(run):
    nasty = b"\0\x1b[2J\n127.0.0.1:1 connected\r\x7f\xff\xc3\xa9"
    long, longer = b"\xff" * 80, b"y" * 500
    script = run("0", "-v")
    with connect(script) as client:
        for lines in [nasty, longer, long], [b""] * 80, [b""] * 85:
            ask(client, b"\r\n".join([*lines, b""]))
    lines = script.stop()[1]
    assert all(32 <= ord(c) < 127 for line in lines for c in line)
    shown = [line.partition(" ")[2] for line in lines[1:4]]
    assert shown == [repr(nasty), f"b'{'y' * 80}'...", repr(long)]
    assert sum(line.endswith(" b''") for line in lines) == 160
    assert [line[-2:] for line in lines if " and more lines: " in line] == [" 5"]


def test_a_log_pipe_that_nobody_reads_stops_nobody(run):
    script = run("-b", "127.0.0.1", "0")
    use(script, 1200)  # about 100 bytes of log each: more than a pipe holds
    pipe = script.process.stdout.fileno()
    while select.select([pipe], [], [], 0.2)[0]:
        os.read(pipe, 1 << 16)
    with connect(script) as client:  # Now the log goes on.
        assert script.line() == f"{as_logged(*client.getsockname())} connected"
    script.process.stdout.close()
    use(script, 3)
    script.process.stdout = None
    assert script.stop() == (0, [], b"")


def test_after_a_log_line_that_was_cut_the_next_one_begins_a_line(run, tmp_path):
    path, limited = tmp_path / "log", 'ulimit -f 1; exec "$@" >>"$0"'
    prefix = ("sh", "-c", limited, str(path))
    script, address = run_on_free_port(run, "12321", prefix=prefix)
    use(address, 20)  # Now the log is full, as a disk may be.
    assert not path.read_bytes().endswith(b"\n")
    os.truncate(path, 0)
    use(address, 1)
    assert script.stop()[::2] == (0, b"")
    assert path.read_bytes().startswith(b"\n127.0.0.1:")


@needs_signals
@pytest.mark.parametrize("how", ["a terminal", ">&-", "2>&-", ">&- 2>&- <&-"])
def test_a_stdout_that_is_not_usable_stops_nobody_and_stays_as_it_was(run, how):
    shell = ("sh", "-c", f'exec "$@" {how if ">" in how else ""}', "sh")
    terminal, stdout = os.openpty()
    with open(terminal, "rb", 0) as screen, open(stdout, "wb", 0):
        script, address = run_on_free_port(run, "12321", prefix=shell, stdout=stdout)
        assert ">&" in how or screen.readline().startswith(b"listening on ")
        use(address, 300)
        assert os.get_blocking(stdout)
        assert script.stop()[::2] == (0, b"")


def test_main_shows_its_log_without_a_descriptor_and_leaves_nothing_behind():
    def write(text):
        texts.append(text)
        assert signal.set_wakeup_fd(-1) != -1
        signal.raise_signal(signal.SIGINT)

    handlers, texts = [lambda *_: None for _ in SIGNALS], []
    before, kept = list(map(signal.signal, SIGNALS, handlers)), list(LOGGER.handlers)
    LOGGER.setLevel(logging.CRITICAL)
    with contextlib.redirect_stdout(types.SimpleNamespace(write=write)):
        main("-b", "127.0.0.1", "0")
    assert list(map(signal.signal, SIGNALS, before)) == handlers
    assert (LOGGER.level, LOGGER.handlers) == (logging.CRITICAL, kept)
    assert signal.set_wakeup_fd(-1) == -1
    if hasattr(signal, "pthread_sigmask"):
        assert not {*SIGNALS} & {*signal.pthread_sigmask(signal.SIG_BLOCK, [])}
    assert re.match(r"listening on 127\.0\.0\.1:\d+\n", texts[0])


# STOPPING
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGINT-that-came-ignored"])
def test_a_signal_ends_it_when_all_who_came_are_answered(run, how):
    lines, number = LINE * 48, signal.Signals[how.partition("-")[0]]
    shell = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")  # as for a background job
    script = run("0", prefix=shell if "ignored" in how else ())
    with connect(script) as idle:
        ask(idle, b"hello\r\nhel", b"hello\r\n")
        script.process.send_signal(signal.SIGSTOP)
        with connected(script, 50) as clients, takes(0, 3):
            for client in clients:
                client.sendall(lines)
            script.process.send_signal(number)
            script.process.send_signal(signal.SIGCONT)
            for client in clients:
                expect(client, lines, eof=True)
            expect(idle, b"", eof=True)
            assert script.process.wait(PATIENCE) == 0
    out, err = script.process.communicate()
    assert (out.count(b" disconnected: server stopping, "), err) == (51, b"")


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
    assert re.search("clients left: 1, for 5 s at most; a second signal ", notice)


def test_signals_may_come_at_any_time(run):
    script = run("0", "-q")
    deadline = time.monotonic() + PATIENCE
    while script.process.poll() is None and time.monotonic() < deadline:
        script.process.send_signal(signal.SIGTERM)
    assert (script.process.wait(PATIENCE), script.process.stderr.read()) == (0, b"")


@needs_signals
def test_until_it_listens_a_signal_ends_it_without_a_traceback(tmp_path):
    code = f"""
import os, runpy, signal, socket, sys
socket.getaddrinfo = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
sys.argv = [{str(SCRIPT)!r}, "0"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    assert in_folder(tmp_path, sys.executable, "-c", code) == (-signal.SIGINT, "")


def test_as_pid_1_it_can_be_terminated(run):
    unshare = ("unshare", "--pid", "--fork", "--kill-child")
    true = (*unshare, "true")
    if not shutil.which("unshare") or subprocess.call(true, stderr=subprocess.DEVNULL):
        pytest.skip("needs unshare, and the right to use it")
    script = run("0", prefix=unshare)
    pid = script.process.pid
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        os.kill(int(children.read()), signal.SIGTERM)
    assert script.process.wait(PATIENCE) == 0


# AS A MODULE
def test_import_starts_nothing_and_installs_no_handler():
    def state():
        handlers = [*map(signal.getsignal, SIGNALS), *LOGGER.handlers]
        return handlers, threading.active_count()

    before = state()
    load_echo()
    assert state() == before


def test_a_wrong_argument_is_refused_at_once():
    wrong = {"max_line": [1e6, NEVER, "9", 0], "max_clients": [1e3, 0]}
    wrong["hosts"] = [[], (), "", ["127.0.0.1", ""], "*", "localhost:80"]
    wrong.update(idle_timeout=[0, NAN], port=[-1, 65536])
    for option, value in [(k, value) for k in wrong for value in wrong[k]]:
        with pytest.raises((TypeError, ValueError)):
            echo.EchoServer(**{"port": 0, "hosts": "127.0.0.1", option: value})


def test_shutdown_may_be_called_at_any_time_any_number_of_times():
    with echo.EchoServer(0) as server:
        for _ in range(5000):  # more wake-ups than the socket pair holds
            server.shutdown()
        in_thread(server.serve_forever).result(PATIENCE)
    server.shutdown()


# THE README
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
        assert " closed by client, 7 bytes" in (tmp_path / "echo.log").read_text()
    (tmp_path / "echo.py").unlink()
    status, printed = in_folder(tmp_path, *step, PATH=path)
    assert (status, "did not start" in printed) == (1, True), printed


def test_the_short_ci_program_keeps_the_status(tmp_path):
    shutil.copy(SCRIPT, tmp_path / "echo.py")
    (tmp_path / "with_echo.py").write_text(block("python", "import os, subprocess"))
    use = "import os, socket; s = socket.create_connection(('localhost', "
    use += "os.environ['ECHO_PORT']), 5); s.sendall(b'hello\\r\\n'); print(s.recv(9))"
    for status in 0, 3:
        command = (sys.executable, "-c", f"{use}; raise SystemExit({status})")
        printed = in_folder(tmp_path, sys.executable, "with_echo.py", *command)
        assert printed == (status, "b'hello\\r\\n'\n")


@pytest.mark.parametrize("mode", ["prepend", "importlib", "append"])
def test_the_pytest_fixture_works_with_each_import_mode(tmp_path, mode):
    shutil.copy(SCRIPT, tmp_path / "echo.py")
    (tmp_path / "pytest.ini").write_text(block("ini", r"\[pytest\]"))
    (tmp_path / "tests").mkdir()
    if mode == "append":
        (tmp_path / "tests" / "__init__.py").touch()  # a package of tests
    recipe = block("python", "import socket\nimport threading\n\nimport pytest")
    (tmp_path / "tests" / "test_it.py").write_text(recipe)
    command = (sys.executable, "-m", "pytest", "-q", f"--import-mode={mode}")
    status, printed = in_folder(tmp_path, *command, "-p", "no:cacheprovider")
    assert (status, "1 passed" in printed) == (0, True), printed


SMALL = block("python", r"import selectors\nimport socket\n\nselector")
LINES = block("python", r"import selectors\nimport socket\nfrom")
POLITE = block("python", r"import socket\ns = [^\n]*timeout=5\)\n")
HALF = block("python", r'import socket\ns = [^\n]*\ns\.sendall\(b"hel"\)')
STALL = block("python", r'import socket\ns = [^\n]*\ns\.sendall\(b"hello\\r\\n" \*')
RUDE = block("python", r"import socket, time\n")


def printed_by(client, address, seconds=PATIENCE):
    """Run a client of the README. Return what it printed."""
    code = client.replace("12321", str(address[1]))
    return in_folder(".", sys.executable, "-c", code, seconds=seconds)[1]


def test_the_first_server_of_the_lesson_sends_half_lines_and_is_stopped(run):
    _, address = run_on_free_port(run, "-c", SMALL)
    assert printed_by(POLITE, address) == "b'hello\\r\\n'\n"
    assert printed_by(HALF, address) == "b'hel'\nb'lo\\r\\n'\n"
    with connect(address) as stalled:
        flood(stalled)
        assert "timed out" in printed_by(POLITE, address)
    if sys.platform == "linux":
        server, address = run_on_free_port(run, "-c", SMALL)
        printed_by(RUDE, address)
        assert server.process.wait(PATIENCE) == 1
        assert b"ConnectionResetError" in server.process.stderr.read()


def test_the_second_server_of_the_lesson_survives_all_three(run):
    server, address = run_on_free_port(run, "-c", LINES)
    with connect(address) as stalled:
        flood(stalled)
        for client in HALF, STALL:
            with pytest.raises(subprocess.TimeoutExpired):
                printed_by(client, address, seconds=1)
        printed_by(RUDE, address)
        assert printed_by(POLITE, address) == "b'hello\\r\\n'\n"
    assert server.process.poll() is None


def test_every_fault_has_a_guard_that_stands_once_and_a_test_that_exists():
    faults = README.partition("\n## Faults\n")[2].partition("\n## ")[0]
    guards = re.findall(r"^ +- Guard, in `([\w.]+)`: `(.+)`$", faults, re.M)
    tests = re.findall(r"^ +- Test: `(\w+)`$", faults, re.M)
    assert len(guards) == len(tests) == len(re.findall(r"^\d+\. ", faults, re.M)) > 0
    for place, guard in guards:
        function = re.findall(r"def (\w+)\(", CODE[: CODE.find(guard)])[-1]
        assert (CODE.count(guard), function) == (1, place.rpartition(".")[2]), guard
    assert [name for name in tests if name not in globals()] == []


# PART TWO: ANY SCHEDULE

# A real kernel mostly takes all that is sent, answers at once, and hardly ever runs out
# of memory. This one does whatever a kernel may do, as a random number decides, and the
# clock is its own. Streams get longer from seed to seed, so that the first failure is a
# short one. There is one seam: simulated_echo() loads a fresh echo.py for which the
# modules socket, selectors and time ask the simulation. The first promise that is
# broken is kept and shown, whatever the server does with the exception.

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
PASSING = ("EAGAIN", "ECONNABORTED")  # errors that say nothing of the next accept()
LASTING = ("EMFILE", "ENOSYS", "EPERM", "EINVAL", "MemoryError")
MOMENT, LINGER = 0.5, 5.0  # seconds: to hang up at least, and an end at most
LATE = 0.5  # seconds by which any time may be missed
DELAYS = (0.3, 2.0, 7.0)  # seconds for which a client stands still


def error_named(name):
    number = getattr(errno, name, None)
    return OSError(number, os.strerror(number)) if number else MemoryError()


def shown(data):
    return f"{data[:16]!r}... ({len(data)} bytes)" if len(data) > 24 else repr(data)


class Violation(BaseException):
    """A broken promise. It is no Exception: the server shall not catch it."""


class Kernel:
    """The time, the selector, and the promises. A setup may set what stands here."""

    seed = None  # of all decisions; None: always the usual case
    faults = 0  # how many calls may fail
    stops = ()  # methods that are called at a time that the choices decide
    delays = False  # whether clients, and the server, may stand still
    piece, gap = NEVER, 0  # most bytes that come at once; seconds between them
    leaves = "half-closes"  # or seconds after the server's EOF
    level = logging.DEBUG
    cpu = NEVER  # process time that may be used

    def __init__(self, streams, **setup):
        vars(self).update({k: setup.pop(k) for k in list(setup) if hasattr(Kernel, k)})
        self.streams, self.limits = streams, setup
        self.chance = random.Random(self.seed or 0)
        self.rarely = self.chance.choice([0.02, 0.1, 0.3])
        self.idle_timeout = setup.get("idle_timeout", NEVER)
        self.now, self.turn, self.late, self.keys = 1000.0, 0, LATE, {}
        self.sockets, self.listeners, self.accepted = [], [], []
        self.wakes, self.told, self.newcomers = 0, [], 0  # told: who is ready now
        self.useless, self.moved = 0, self.now  # turns without progress; the last one
        self.rest_until, self.shortages, self.cannot_wait = 0.0, 0, False
        self.may_miss = False  # whether a newcomer may be left out at a stop
        self.server, self.early = None, False  # early: stopped before all was done
        self.stopped = self.closed = NEVER  # when shutdown() and close() were called
        self.violation, self.calls, self.register = "", [], self.modify

    def must(self, condition, promise):
        """Keep the first promise that is broken, and end the run."""
        trace = sys.exc_info()[2]
        if trace and trace.tb_frame.f_code.co_name == "serve_forever":
            return  # It is dying: run() tells of what. What follows is not shown.
        if self.violation or not condition:
            self.violation = self.violation or promise
            raise Violation(self.violation)

    def note(self, call):
        self.calls += [] if self.violation else [[f"{self.now - 1000:.2f} {call}"]]
        return self.calls[-1]

    def begin(self, sock, call):
        self.call = self.note(call)  # Its result comes later.
        self.must(sock.closed == NEVER, "a closed socket is used")
        self.must(not sock.blocking, "a call can block")

    def succeed(self, result):
        """Note a result, which is progress."""
        self.call.append(f" = {result}")
        self.useless, self.moved = 0, self.now

    def refuse(self, sock, error):
        self.call.append(f" = -1 {error}")
        sock.fail(error)
        raise error_named(error)

    def run(self):
        Kernel.current, echo = self, simulated_echo()
        with logged(self.level) as self.log, contextlib.suppress(Violation):
            try:
                self.server = echo.EchoServer(0, **self.limits)
                for i, stream in enumerate(self.streams):  # They take turns.
                    self.listeners[i % len(self.listeners)].queue.append((i, stream))
                self.server.serve_forever()
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                lines = [f.lineno for f in frames if f.filename == str(SCRIPT)]
                if not (self.cannot_wait and isinstance(error, OSError)):
                    self.violation = f"it dies: {error!r} at line {lines[-1]}"
            else:
                self.must(not self.cannot_wait, "nobody hears that it cannot wait")
            self.check_end()
        return self

    def decide(self, sock, common, delays=(), errors=()):
        """Return one of the options, or spend a fault; before that, perhaps stop."""
        delays, errors = delays if self.delays else (), errors if self.faults else ()
        if self.seed is None or not self.server:
            return common[0]
        rare = (*delays, *errors, *self.stops)
        is_rare = rare and self.chance.random() < self.rarely
        option = self.chance.choice(rare if is_rare else common)
        if option in self.stops:
            self.early = True
            self.stop(option)
            return self.decide(sock, common, delays, errors)
        if option in errors:
            self.faults, self.useless = self.faults - 1, 0
            self.refuse(sock, option)
        return option

    def stop(self, name):
        """Call shutdown() or close(), as a signal or another thread would."""
        self.stops = tuple(n for n in self.stops if n != name)
        self.note(f"{name}()")
        if name == "close":
            self.closed = self.now
        if self.stopped == NEVER:
            self.stopped, self.stopped_turn = self.now, self.turn
            stay = [c for c in self.open() if not (c.is_done() and c.is_ready(READ))]
            self.may_miss = len(stay) >= self.server.max_clients
            for client in self.accepted:
                client.doomed = min(client.doomed, self.now)
        getattr(self.server, name)()

    def open(self):
        return [client for client in self.accepted if client.closed == NEVER]

    def full(self):
        return len(self.open()) >= self.server.max_clients

    def modify(self, sock, events, data=None):
        self.keys.pop(sock, None)  # As in selectors: if it fails, it is unregistered.
        if sock.label != "wake":
            self.begin(sock, f"register({sock}, {events})")
            self.decide(sock, [None], errors=("ENOMEM",))
        self.keys[sock] = selectors.SelectorKey(sock, sock.fileno(), events, data)

    def unregister(self, sock):
        self.keys.pop(sock)

    def close(self):
        self.keys = None

    def fail(self, error):
        self.cannot_wait, self.early, self.closed = True, True, self.now

    def ready(self):
        watched = [self.keys[sock] for sock in self.sockets if sock in self.keys]
        return [key for key in watched if key.fileobj.is_ready(key.events)]

    def select(self, timeout=None):
        asked = self.now
        self.check_turn()
        if not self.ready():
            self.pass_time(timeout)
        ready = self.ready()
        self.call = self.note(f"select({timeout and round(timeout, 2)})")
        counts = range(len(ready), 0, -1) or [0]  # how many of them are ready by now
        ready = self.chance.sample(ready, self.decide(self, counts, errors=("EPERM",)))
        self.told = [key.fileobj for key in ready]
        self.may_miss |= self.stopped < NEVER and len(ready) < len(self.ready())
        self.call.append(f" = {self.told}")
        if self.late == LATE and self.decide(self, [False], [True]):
            self.now, self.late = self.now + 7, LATE + 7  # It stood still: Ctrl-Z, fg.
        for client in self.open():
            if client.moved + self.idle_timeout <= asked and client not in self.told:
                client.fail("EAGAIN")
        return [(key, key.events) for key in ready]

    def pass_time(self, timeout):
        """Nobody is ready: let the time pass."""
        end = NEVER if timeout is None else self.now + max(timeout, 0)
        waiting = [listener for listener in self.listeners if listener.queue]
        moments = [t for client in self.open() for t in client.moments()]
        moments += [listener.comes for listener in waiting]
        moment = min((t for t in moments if t > self.now), default=NEVER)
        is_over = not (self.open() or waiting or self.stopped < NEVER)
        if moment < NEVER and moment <= end:
            self.now = moment
        elif end < NEVER and (not is_over or self.now < self.rest_until):
            self.now = end + 0.000001
        else:  # Nothing is left to come, and the server waits.
            self.must(self.stopped == NEVER, "it hangs, though it was told to stop")
            self.must(self.full() or not waiting, "it hangs: newcomers wait")
            self.now += 60
            self.check_times()
            self.stop("shutdown")

    def check_turn(self):
        """What holds whenever the server waits."""
        self.turn, self.useless, self.newcomers = self.turn + 1, self.useless + 1, 0
        self.must(self.turn < 9000, "it is busy without end")
        calm = self.useless <= 8 + 10 * (self.now - self.moved)
        self.must(calm, "it is busy though nothing happens")
        rests = self.rest_until and self.now <= self.rest_until + self.late
        if not (rests or self.full() or self.stopped < NEVER):
            watched = all(listener in self.keys for listener in self.listeners)
            self.must(watched, "nobody accepts newcomers any more")
        for client in self.open():
            client.check()
        self.check_times()

    def check_times(self):
        """No wait is longer than promised."""

        def within(seconds, since, promise):
            self.must(self.now <= since + seconds + self.late, promise)

        within(-LATE, self.closed, "close() does not end it at once")
        for client in self.open():
            within(LINGER, client.doomed, "an end takes longer than 5 s")
            if client.ended < NEVER and not client.owed():
                promise = "it waits too long for a client to hang up"
                within(0, client.silent_until(), promise)
            elif client.doomed == NEVER:
                seconds = self.idle_timeout + (client.owed() and LINGER + LATE)
                within(seconds, client.moved, "an idle client is kept")

    def check_end(self):
        """What holds after serve_forever()."""
        self.must(self.stopped < NEVER or self.cannot_wait, "it ends by itself")
        are_closed = all(sock.closed < NEVER for sock in self.sockets)
        self.must(are_closed and self.keys is None, "something is left open")
        for client in self.accepted:
            whole = client.sent == client.rule(len(client.stream))
            was_cut = client.failed or client.is_cut or client.idle_since < self.now
            self.must(whole or self.early or was_cut, "the answer is not whole")
            client.check_log(self.log.texts(re.escape(client.name)))
        warned = self.log.texts("^(?!.*LF)", logging.WARNING)
        self.must(len(warned) == self.shortages, "not one warning for each pause")


class Socket:
    """What all simulated sockets have in common; the socket pair has no more."""

    blocking, closed, was_shut = True, NEVER, False

    def __init__(self, label="wake"):
        self.kernel, self.label = Kernel.current, label
        self.kernel.sockets.append(self)

    def __repr__(self):
        return str(self.label)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def fileno(self):
        return 5000

    def setblocking(self, flag):
        self.blocking = flag

    def setsockopt(self, *_):
        pass

    def is_ready(self, event):
        return self.kernel.wakes > 0

    def send(self, data):
        if self.closed < NEVER:
            raise error_named("EBADF")
        self.kernel.must(not self.blocking, "a wake-up can block")
        self.kernel.wakes += len(data)

    def recv(self, size):
        self.kernel.begin(self, "recv(wake)")
        count, self.kernel.wakes = self.kernel.wakes, 0
        return b"\0" * count

    def recv_into(self, buffer, size=0):
        data = self.recv(size or len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def shutdown(self, how):
        self.was_shut |= how == socket.SHUT_RDWR
        self.kernel.note(f"shutdown({self}, {how})")

    def close(self):
        is_watched = self in (self.kernel.keys or ())
        self.kernel.must(not is_watched, "a socket is closed before it is unregistered")
        self.kernel.note(f"close({self})")
        self.closed = self.kernel.now


class Listener(Socket):
    def __init__(self, family=None, *_, **__):
        super().__init__("listener")
        self.queue, self.comes = [], 0.0  # when the first of them comes
        self.rest_until, self.listen = 0.0, self.setsockopt

    def bind(self, address):
        self.address = (address[0], address[1] or 12321, *address[2:])
        self.kernel.listeners.append(self)
        return self

    def getsockname(self):
        return self.address

    def is_ready(self, event):
        return bool(self.queue) and self.comes <= self.kernel.now

    def fail(self, error):
        kernel = self.kernel
        kernel.may_miss = kernel.stopped < NEVER
        if error not in PASSING:
            # Another listener may be tried in the same turn: one warning for both.
            kernel.shortages += kernel.now >= kernel.rest_until
            self.rest_until = kernel.rest_until = kernel.now + 1

    def accept(self):
        kernel, stops = self.kernel, self.kernel.stopped < NEVER
        kernel.begin(self, "accept(listener)")
        kernel.must(stops or kernel.now >= self.rest_until, "accepting does not pause")
        kernel.must(not kernel.full(), "more clients than --max-clients are in")
        if not self.is_ready(READ):
            kernel.refuse(self, "EAGAIN")
        kernel.decide(self, [None], errors=(*PASSING, *LASTING))
        kernel.newcomers += 1
        few = stops or kernel.newcomers <= max(100, len(kernel.told))
        kernel.must(few, "newcomers delay the other clients")
        client = Connection(self, *self.queue.pop(0))
        if self.queue:
            delay = kernel.decide(self, [0], DELAYS)
            self.comes = max(self.comes, delay and kernel.now + delay)
        kernel.may_miss = kernel.stopped < NEVER and (kernel.may_miss or kernel.full())
        kernel.succeed(client)
        return client, (self.address[0], client.label, *self.address[2:])

    def close(self):
        kernel, came = self.kernel, self.queue and self.comes < self.kernel.stopped
        excused = not came or kernel.may_miss or kernel.closed < NEVER
        kernel.must(excused, "newcomers who came before the stop are left out")
        super().close()


class Connection(Socket):
    """The server's end of a connection, and what has gone through it."""

    failed = ""  # the error that is its end
    ended = NEVER  # when the server sent EOF
    idle_since = NEVER  # the earliest time at which an idle end is right
    hung_up = is_cut = False

    def __init__(self, listener, number, stream):
        super().__init__(40000 + number)
        kernel = self.kernel
        self.name = as_logged(listener.address[0], self.label)
        self.stream = stream
        self.terminator = b"\n" if kernel.limits.get("lf") else b"\r\n"
        self.max_line = kernel.limits.get("max_line", 1 << 20)
        lines = self.stream.split(self.terminator)[:-1]
        fitting = itertools.takewhile(lambda line: len(line) <= self.max_line, lines)
        sizes = (len(line + self.terminator) for line in fitting)
        self.ends = [0, *itertools.accumulate(sizes)]  # of the lines that come back
        self.read = self.heard = self.sent = 0  # bytes; heard: before the server's EOF
        self.accepted_turn, self.read_turn = kernel.turn, 0
        self.arrives = self.room_at = self.moved = kernel.now
        self.leaves = kernel.decide(self, [kernel.leaves], [*DELAYS, NEVER])
        self.acks = kernel.decide(self, [0], [*DELAYS, NEVER])
        self.doomed = kernel.stopped  # since when its end is due
        kernel.accepted.append(self)

    def rule(self, count):
        """Return how many bytes of the first `count` come back."""
        return max(end for end in self.ends if end <= count)

    def owed(self):
        return self.rule(self.heard) - self.sent

    def unfinished(self):
        return self.heard - self.rule(self.heard)

    def is_done(self):
        return self.read == len(self.stream) and not self.owed()

    def is_too_long(self):
        return self.unfinished() >= self.max_line + len(self.terminator)

    def silent_until(self):
        """Return until when it must be silent before it may be closed."""
        acknowledged = self.ended + (self.acks if sys.platform == "linux" else 0)
        return max(max(self.ended, self.moved) + MOMENT, acknowledged)

    def moments(self):
        """Return from when on it is ready to read, and to write."""
        leaves = self.arrives
        if self.is_done() and self.leaves != "half-closes":
            leaves = self.ended + self.leaves
        return max(self.arrives, leaves), self.room_at

    def is_ready(self, event):
        moments = zip((READ, WRITE), self.moments())
        is_ready = any(event & e and t <= self.kernel.now for e, t in moments)
        return self.failed or is_ready

    def fail(self, error):
        if error == "EAGAIN":  # Now the server knows that nothing has come.
            idle_since = self.moved + self.kernel.idle_timeout
            self.idle_since = min(self.idle_since, idle_since)
        else:
            self.failed = error

    def check(self):
        """What holds whenever the server waits."""
        must, key = self.kernel.must, self.kernel.keys.get(self)
        must(self.failed in ("", "ENOTCONN"), "a connection that has failed is kept")
        must(key, "it does not wait for a client")
        what = "a complete line" if self.sent in self.ends else "the rest of a line"
        promises = f"{what} is not sent", f"neither {what} nor EOF is sent"
        promise = promises[self.idle_since <= self.kernel.now]
        must(not self.owed() or key.events == WRITE, promise)
        must(self.owed() or key.events == READ, "it waits for room, and owes nothing")
        ends = self.ended < NEVER or self.owed() or not self.is_too_long()
        must(ends, "a line that is too long ends nothing")

    def check_log(self, texts):
        """What the log has told of it in the end."""
        must, is_lf = self.kernel.must, self.terminator == b"\n"
        counts = f"{self.sent} bytes echoed, {self.read - self.sent} dropped"
        ends = [text.partition(" disconnected: ")[2] for text in texts]
        told = [bool(re.fullmatch(rf"\w.*, {counts}", end)) for end in ends if end]
        must(told == [True], "the log does not tell of an end and its bytes")
        if not self.failed:
            whole = self.rule(self.heard)
            hints = sum("LF alone" in text for text in texts)
            has_lf = b"\n" in self.stream[whole : self.heard]
            must(has_lf <= hints + is_lf <= 1, "not one hint for LF alone")
            shown = [text.partition(" ")[2] for text in texts if text.endswith("'")]
            lines = self.stream[:whole].split(self.terminator)[:-1]
            expected = lines if self.kernel.level == logging.DEBUG else []
            must(shown == list(map(repr, expected)), "the log does not show each line")

    def recv(self, size):
        kernel = self.kernel
        kernel.begin(self, f"recv({self}, {size})")
        kernel.must(time.process_time() < kernel.cpu, "it takes quadratic time")
        kernel.must(size > 0, "it asks for 0 bytes, which looks like EOF")
        kernel.must(not self.owed(), "it reads from a client that it owes bytes")
        kernel.must(self.read_turn < kernel.turn, "it reads twice in a turn")
        self.read_turn = kernel.turn
        if self.failed or not self.is_ready(READ):
            kernel.refuse(self, "ECONNRESET" if self.failed else "EAGAIN")
        most = min(len(self.stream) - self.read, kernel.piece, size)
        counts = range(most, 0, -1) or [0]
        errors = ("EAGAIN", "ECONNRESET", "MemoryError")
        count = kernel.decide(self, counts, errors=errors)
        self.read += count
        if self.read < len(self.stream):
            self.arrives = kernel.now + kernel.decide(self, [kernel.gap], DELAYS)
        self.hung_up = not count
        self.moved = kernel.now if count else self.moved
        self.heard = self.read if self.ended == NEVER else self.heard
        if self.is_too_long():
            self.doomed = min(self.doomed, kernel.now)
        data = self.stream[self.read - count : self.read]
        kernel.succeed(shown(data))
        return data

    def send(self, data):
        kernel, key, data = self.kernel, self.kernel.keys.get(self), bytes(data)
        kernel.begin(self, f"send({self}, {shown(data)})")
        owed = self.stream[self.sent : self.rule(self.heard)]
        kernel.must(data and owed.startswith(data), "it sends what it does not owe")
        if self.room_at > kernel.now:
            kernel.refuse(self, "EAGAIN")
        # Who was reported as ready has room for a byte; another may have none.
        told = self in kernel.told and key.events == WRITE
        errors = ("EPIPE", "MemoryError", "EAGAIN")[: 2 + told]
        counts = range(len(data), 0 if told else -1, -1)
        count = kernel.decide(self, counts, errors=errors)
        gap = kernel.decide(self, [0], DELAYS) if count < len(data) else 0
        self.room_at = kernel.now + gap
        if not count:
            kernel.refuse(self, "EAGAIN")
        self.sent, self.moved = self.sent + count, kernel.now
        kernel.succeed(count)
        return count

    def getsockopt(self, level, name, size=0):
        unacked = self.ended <= self.kernel.now < self.ended + self.acks  # FIN_WAIT1
        state = b"\4" if unacked and name == socket.TCP_INFO else b"\1"
        return state.ljust(size, b"\0") if size else 0

    def shutdown(self, how):
        kernel, must = self.kernel, self.kernel.must
        super().shutdown(how)
        if how == socket.SHUT_WR and self.ended == NEVER:
            must(not self.owed(), "EOF comes before bytes that are owed")
            stops = kernel.stopped < NEVER and kernel.turn > kernel.stopped_turn
            is_long = self.unfinished() > self.max_line
            is_idle = self.idle_since <= kernel.now
            reason = stops or is_long or is_idle
            must(reason, "it ends a connection too early, or for no reason")
            self.ended, self.doomed = kernel.now, min(self.doomed, kernel.now)
            kernel.decide(self, [None], errors=("ENOTCONN",))

    def close(self):
        kernel, must = self.kernel, self.kernel.must
        must(self.was_shut, "closed without shutdown(): a forked child holds it open")
        self.is_cut = kernel.now >= min(self.doomed, self.idle_since) + LINGER
        if not (self.failed or self.hung_up or self.is_cut or kernel.closed < NEVER):
            promise = "a client gets no EOF before its connection is closed"
            must(self.ended < NEVER, promise)
            must(kernel.now >= self.silent_until(), "a client had no time to hang up")
        super().close()


def load_echo(**fakes):
    """Load a fresh echo.py, for which some things in modules are replaced."""
    spec = importlib.util.spec_from_file_location("echo", SCRIPT)
    fresh = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, replaced in fakes.items():
            copy = types.SimpleNamespace(**{**vars(sys.modules[name]), **replaced})
            patch.setitem(sys.modules, name, copy)
        spec.loader.exec_module(fresh)
    return fresh


def getnameinfo(address, flags):
    is_numeric = flags & socket.NI_NUMERICHOST and flags & socket.NI_NUMERICSERV
    Kernel.current.must(is_numeric, "a name is looked up while clients wait")
    return address[0], str(address[1])


@functools.lru_cache(maxsize=None)
def simulated_echo():
    """Return a fresh echo.py that runs in the simulation."""
    fakes = dict.fromkeys(("getnameinfo", "getfqdn", "gethostbyaddr"), getnameinfo)
    fakes.update(socket=Listener, socketpair=lambda *_: (Socket(), Socket()))
    fakes["create_server"] = lambda address, **_: Listener().bind(address)
    return load_echo(
        socket=fakes,
        selectors={"DefaultSelector": lambda: Kernel.current},
        time={"monotonic": lambda: Kernel.current.now},
    )


def simulate(streams, **setup):
    """Run one schedule. What a failure prints runs it again."""
    kernel = Kernel(streams, **setup).run()
    if kernel.violation:
        keywords = "".join(f"{name}={value!r}, " for name, value in setup.items())
        again = textwrap.wrap(f"simulate({keywords}streams={streams})"[:600], 88)
        calls = textwrap.wrap("; ".join(map("".join, kernel.calls[-30:])), 88)[-14:]
        lines = [kernel.violation, *again, "The last calls:", *calls]
        pytest.fail("\n".join(lines), pytrace=False)
    return kernel


PIECES = [b"\r\n", b"\r\n", b"\r", b"\n", b"a", b"b", b"c", b"d"]
STOP, CLOSE = ("shutdown",), ("close",)
SETUPS = {  # Each of them is chosen, or left out.
    "delays": [True],
    "faults": [1, 3],
    "stops": [STOP, STOP, CLOSE, STOP + CLOSE],
    "leaves": [0.3, 2, 7, 60],
    "hosts": ["127.0.0.1"],
    "lf": [True],
    "max_line": [1, 3, 6],
    "max_clients": [1, 2],
    "idle_timeout": [0.4, 1, 3, 20],
}


@pytest.mark.parametrize("first", range(0, 6000, 300), ids="seeds-from-{}".format)
def test_every_promise_is_kept_whatever_the_kernel_does(first):
    for seed in range(first, first + 300):
        chance, longest = random.Random(-seed), seed // 40 % 100
        sizes = [chance.randint(0, longest) for _ in range(chance.choice([1, 1, 2, 3]))]
        streams = [b"".join(chance.choices(PIECES, k=size)) for size in sizes]
        setup = {n: chance.choice(SETUPS[n]) for n in SETUPS if chance.random() < 0.5}
        simulate(streams, seed=seed, **setup)


def test_newcomers_wait_no_longer_because_others_are_busy():
    busy, waiting = [b"x\r\n" * 40] * 100, [b"x\r\n"] * 100
    kernel = simulate(busy + waiting, piece=3, gap=0.001, leaves=60)
    assert kernel.accepted[-1].accepted_turn < 40


@pytest.mark.parametrize("begins", [b"\n", b"x"], ids=["LF-first", "without-LF"])
def test_a_long_line_in_small_pieces_is_searched_once(begins):
    line = begins + b"x" * (8192 * 7000) + b"\r\n"
    cpu = time.process_time() + 3  # seconds; far more if it is searched repeatedly
    kernel = simulate([line], cpu=cpu, piece=8192, max_line=1 << 26, level=logging.INFO)
    assert kernel.accepted[0].sent == len(line)
