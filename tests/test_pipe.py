"""The engine's end of the pipe: frames in any pieces, sends that never wait, the front's end."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock import wire
from penstock.pipe import EngineChannel, Frames, FrontGone


@pytest.fixture
def ends():
    front, theirs = socket.socketpair()
    yield front, EngineChannel(theirs, exit_grace=None)
    front.close()


@given(st.lists(st.binary(max_size=600), max_size=8), st.lists(st.integers(1, 700), min_size=1))
def test_frames_come_whole_whatever_the_pieces(bodies, cuts):
    stream = b"".join(len(body).to_bytes(4, "little") + body for body in bodies)
    frames, heard, at = Frames(), [], 0
    for size in itertools.cycle(cuts):
        if at >= len(stream):
            break
        heard += frames.feed(stream[at : at + size])
        at += size
    assert heard == bodies


def test_a_length_beyond_the_bound_is_refused():
    with pytest.raises(ValueError, match="frame of"):
        Frames().feed((wire.MAX_FRAME + 1).to_bytes(4, "little"))


def test_messages_arrive_in_order_and_wake_the_loop(ends):
    front, channel = ends
    assert channel.receive() == []
    front.sendall(wire.encode(wire.End(1, 2)) + wire.encode(wire.End(3, 4)))
    heard = channel.receive(None)
    while len(heard) < 2:
        heard += channel.receive(None)
    assert heard == [wire.End(1, 2), wire.End(3, 4)]


def test_what_came_before_the_end_is_received_then_the_front_is_gone(ends):
    front, channel = ends
    front.sendall(wire.encode(wire.Shutdown()))
    front.close()
    assert channel.receive(None) == [wire.Shutdown()]
    for _ in range(2):
        with pytest.raises(FrontGone):
            channel.receive(None)


def test_bytes_that_are_no_message_end_the_channel(ends, capsys):
    front, channel = ends
    front.sendall(b"\x03\x00\x00\x00abc")
    with pytest.raises(FrontGone):
        channel.receive(None)
    assert "no message" in capsys.readouterr().err


def test_send_does_not_wait_for_a_front_that_does_not_read(ends):
    front, channel = ends
    message = wire.Step([wire.Row(1, list(range(1000)))])
    size = len(wire.encode(message))
    sender = threading.Thread(target=lambda: [channel.send(message) for _ in range(1000)])
    sender.start()
    sender.join(timeout=20)
    assert not sender.is_alive()
    assert channel.backlog > 500 * size
    frames, heard = Frames(), []
    while len(heard) < 1000:
        heard += frames.feed(front.recv(1 << 20))
    assert all(wire.decode_to_front(body) == message for body in heard)
    channel.flush(5)
    assert channel.backlog == 0


def test_send_to_a_front_that_is_gone_is_void(ends):
    front, channel = ends
    front.close()
    for _ in range(100):
        channel.send(wire.Loading("x" * 10000))
    channel.flush(5)
    assert channel.backlog == 0


def test_a_stuck_loop_does_not_outlive_the_front():
    front, theirs = socket.socketpair()
    command = [sys.executable, "-c", _STUCK, str(theirs.fileno())]
    engine = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    assert front.recv(1 << 16)
    front.close()
    assert engine.wait(timeout=20) == 1


_STUCK = """
import socket, sys, time
from penstock import wire
from penstock.pipe import EngineChannel
channel = EngineChannel(socket.socket(fileno=int(sys.argv[1])), exit_grace=0.2)
channel.send(wire.Loading("stuck"))
time.sleep(600)
"""


def test_the_engines_end_imports_neither_asyncio_nor_mlx():
    check = "import sys, penstock.pipe; print(sorted({'asyncio', 'mlx', 'mlx_lm'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
