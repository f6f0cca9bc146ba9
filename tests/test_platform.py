from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from penstock import platform


def never(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("a means of another system was tried")


@pytest.fixture
def darwin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac, as far as `platform` can see; Linux's means fail the test that tries them."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "_holder_by_proc", never)


@pytest.fixture
def linux_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "backend", lambda: "cpu")
    monkeypatch.setattr(platform, "openblas", lambda: "/lib/libopenblas.so.0")


@pytest.mark.usefixtures("darwin")
def test_nothing_is_preloaded_on_darwin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda _: True)
    assert platform.openblas() is None
    assert platform.backend() == "metal"
    assert platform.backend_problem() is None
    monkeypatch.setattr(platform, "backend", lambda: "cpu")
    monkeypatch.setattr(platform, "openblas", never)
    assert platform.engine_environment({"HOME": "h"}) == {"HOME": "h"}


@pytest.mark.usefixtures("darwin")
def test_darwin_asks_lsof_who_holds_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def lsof(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:3] == ["lsof", "-nP", "-iTCP:8080"]
        return subprocess.CompletedProcess(command, 0, "p4242\ncollama\nf12\n", "")

    monkeypatch.setattr(subprocess, "run", lsof)
    assert platform.port_holder(8080) == platform.Holder(4242, "ollama")


def test_lsof_that_tells_nothing_names_nobody() -> None:
    assert platform.parse_lsof("") is None


@pytest.mark.usefixtures("linux_cpu")
def test_openblas_goes_before_what_was_preloaded_already() -> None:
    assert platform.engine_environment({})["LD_PRELOAD"] == "/lib/libopenblas.so.0"
    assert platform.engine_environment({"LD_PRELOAD": "x.so"})["LD_PRELOAD"] == "/lib/libopenblas.so.0:x.so"
    already = platform.engine_environment({"LD_PRELOAD": "/opt/libopenblas.so"})
    assert already["LD_PRELOAD"] == "/opt/libopenblas.so"


def test_openblas_is_told_which_kernels_a_processor_can_run_that_it_may_not_know(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    wide = "avx512f avx512bw avx512cd avx512dq avx512vl"
    for flags, kernels in (
        (f"sse2 avx2 fma {wide}", "SkylakeX"),
        ("avx2 fma avx512f", "Haswell"),
        ("avx", None),
    ):
        cpuinfo.write_text(f"model name\t: a new one\nflags\t\t: fpu {flags}\nbugs\t: avx2 fma\n")
        assert platform.openblas_kernels(cpuinfo) == kernels
    cpuinfo.write_text("Features\t: fp asimd\n")
    assert platform.openblas_kernels(cpuinfo) is None
    assert platform.openblas_kernels(tmp_path / "none") is None


@pytest.mark.usefixtures("linux_cpu")
def test_kernels_that_the_user_chose_stay() -> None:
    assert platform.engine_environment({"OPENBLAS_CORETYPE": "Zen"})["OPENBLAS_CORETYPE"] == "Zen"


@pytest.mark.usefixtures("linux_cpu")
@pytest.mark.parametrize("backend", ["cuda", None])
def test_only_the_cpu_back_end_is_preloaded(monkeypatch: pytest.MonkeyPatch, backend: str | None) -> None:
    monkeypatch.setattr(platform, "backend", lambda: backend)
    assert platform.engine_environment({}) == {}


@pytest.mark.usefixtures("linux_cpu")
def test_without_openblas_nothing_is_preloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "openblas", lambda: None)
    assert "LD_PRELOAD" not in platform.engine_environment({"A": "b"})


@pytest.mark.usefixtures("linux_cpu")
def test_freed_arrays_go_back_to_the_system_unless_the_user_set_it_otherwise() -> None:
    theirs = platform.engine_environment({"MALLOC_TRIM_THRESHOLD_": "7"})
    assert theirs["MALLOC_TRIM_THRESHOLD_"] == "7"
    assert int(theirs["MALLOC_MMAP_THRESHOLD_"]) <= 1 << 20


def test_a_missing_back_end_is_said_with_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "backend", lambda: None)
    sentence = platform.backend_problem()
    assert sentence is not None
    assert f"{sys.executable} -m pip install 'mlx[cpu]==" in sentence
    assert "cuda13" in sentence


def test_a_busy_port_is_said_with_the_program_that_holds_it() -> None:
    with platform.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(platform.PortProblem) as caught:
            platform.listen("127.0.0.1", port)
    assert caught.value.exit_code == 1
    assert f"Port {port} is in use" in str(caught.value)
    if sys.platform == "linux":
        assert f"(process {os.getpid()})" in str(caught.value)


def test_a_port_can_be_taken_again_at_once() -> None:
    with platform.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            listener.accept()[0].close()
    platform.listen("127.0.0.1", port).close()


def test_an_address_that_is_none_is_for_the_user_to_mend() -> None:
    with pytest.raises(platform.PortProblem, match="no such address") as caught:
        platform.listen("256.1.1.1", 0)
    assert caught.value.exit_code == 2


def test_proc_without_the_port_names_nobody(tmp_path: Path) -> None:
    assert platform._holder_by_proc(8080, tmp_path) is None


def test_the_programs_of_this_machine_are_listed_with_their_arguments() -> None:
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "a mark"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()  # while it is still being started it has no command line
        found = {pid: words for pid, words in platform.programs() if pid == child.pid}
        child.communicate()
    assert "a mark" in found[child.pid]


def test_darwins_ps_lists_pids_and_command_lines() -> None:
    told = "    1 /sbin/launchd\n  512 /Applications/LM Studio.app/Contents/MacOS/LM Studio --flag\n\nnone\n"
    assert platform.parse_ps(told) == [
        (1, "/sbin/launchd"),
        (512, "/Applications/LM Studio.app/Contents/MacOS/LM Studio --flag"),
    ]
