"""What this machine is: the back end MLX has here, how its engine is started, who holds a port.

Each fact is read by the means of the system it belongs to: /proc and preloading are Linux's, `lsof` is
Darwin's, and neither is ever tried on the other. Never imports MLX: it looks at what is installed.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib.metadata
import importlib.util
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.errors import StartProblem

_OPENBLAS = (
    "/usr/lib/{machine}-linux-gnu/openblas-pthread/libopenblas.so.0",
    "/usr/lib/{machine}-linux-gnu/libopenblas.so.0",
    "/usr/lib64/libopenblasp.so.0",
    "/usr/lib64/libopenblas.so.0",
    "/usr/lib/libopenblas.so.0",
    "/usr/local/lib/libopenblas.so.0",
)
_KERNELS = {
    "SkylakeX": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "Haswell": {"avx2", "fma"},
}
"""OpenBLAS's kernels by what they need of the processor, the fastest first."""
_RXT_CONNDROPTIME = 0x80
"""Darwin's TCP_USER_TIMEOUT, in seconds; Python has no name for it."""
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "1048576"}
PYTHON = (sys.executable, "-P")
"""Starts a process of ours, which imports nothing from the directory that the server is started in."""
BACKLOG = 1024
OPENBLAS_HINT = "MLX's CPU matmul is 10 to 20 times slower without it: apt-get install libopenblas0-pthread"


def backend() -> str | None:
    """'metal', 'cuda' or 'cpu', by what is installed; None: MLX has no back end here."""
    if sys.platform == "darwin":
        return "metal"
    spec = importlib.util.find_spec("mlx")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not any((Path(place) / "lib" / "libmlx.so").is_file() for place in places):
        return None
    cuda = (importlib.metadata.distributions(name=name) for name in ("mlx-cuda-13", "mlx-cuda-12"))
    return "cuda" if any(map(any, cuda)) else "cpu"


def backend_problem() -> str | None:
    """One sentence with the command that mends it, if MLX has no back end here."""
    if backend() is not None:
        return None
    install = f"{sys.executable} -m pip install"
    if importlib.util.find_spec("pip") is None:
        install = f"uv pip install --python {sys.executable}"
    try:
        pin = "==" + importlib.metadata.version("mlx")
    except importlib.metadata.PackageNotFoundError:
        pin = ""
    return (
        f"MLX has no back end on this machine: run `{install} 'mlx[cpu]{pin}'`, "
        "or with cuda13 in place of cpu for an NVIDIA GPU."
    )


def openblas() -> str | None:
    """The path of an installed libopenblas. Linux only; None elsewhere."""
    if sys.platform != "linux":
        return None
    machine = platform.machine()
    return next((path for form in _OPENBLAS if os.path.exists(path := form.format(machine=machine))), None)


def openblas_kernels(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The fastest of OpenBLAS's kernels that the processor can run; None: leave it to OpenBLAS."""
    try:
        found = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    flags = set(found[1].split()) if found else set()
    return next((name for name, needed in _KERNELS.items() if needed <= flags), None)


def engine_environment(base: Mapping[str, str]) -> dict[str, str]:
    """The environment to start an engine with: `base`, and on Linux's CPU back end what MLX needs there.

    MLX's CPU wheel links a reference BLAS; a preloaded OpenBLAS answers its calls instead. It takes a
    processor newer than itself for one of 2004, so its kernels are named for it. glibc keeps what
    MLX frees (its thresholds grow with use), so that limits on processes count bytes that no ledger knows:
    with thresholds that are set, large arrays go back to the system when they are freed.
    """
    environment = dict(base)
    preloaded = environment.get("LD_PRELOAD", "")
    if sys.platform != "linux" or backend() != "cpu":
        return environment
    for name, value in _MALLOC.items():
        environment.setdefault(name, value)
    if (kernels := openblas_kernels()) is not None:
        environment.setdefault("OPENBLAS_CORETYPE", kernels)
    if "openblas" in preloaded:
        return environment
    library = openblas()
    if library is not None:
        environment["LD_PRELOAD"] = f"{library}:{preloaded}" if preloaded else library
    return environment


class PortProblem(StartProblem):
    """The port cannot be listened on."""


def notice_vanished_peer(sock: Any, seconds: int) -> None:
    """Let a TCP connection fail whose peer has answered nothing for so long, sent to or not.

    By probes where nothing is under way; where something is by the time that it stays unacknowledged, which
    on Linux is also how long a peer may read nothing at all.
    """
    probe = {"SO_KEEPALIVE": 1, "TCP_KEEPINTVL": max(1, seconds // 4), "TCP_KEEPCNT": 2}
    probe |= {name: max(1, seconds // 2) for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE")}
    for name, value in {**probe, "TCP_USER_TIMEOUT": seconds * 1000}.items():
        level = socket.SOL_SOCKET if name.startswith("SO") else socket.IPPROTO_TCP
        with contextlib.suppress(OSError, AttributeError):  # each system has some of them
            sock.setsockopt(level, getattr(socket, name), value)
    if sys.platform == "darwin":
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, _RXT_CONNDROPTIME, seconds)


@dataclass(frozen=True)
class Holder:
    """The process that listens on a port."""

    pid: int
    name: str


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises PortProblem with one sentence."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except socket.gaierror:
        raise PortProblem(f"--host {host}: no such address.") from None
    except PermissionError:
        raise PortProblem(
            f"Port {port} needs rights that this user has not got: take one above 1023."
        ) from None
    except OSError as error:
        raise PortProblem(_why_not(host, port, error), exit_code=1) from None


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno != errno.EADDRINUSE:
        return f"{host}:{port} cannot be listened on: {os.strerror(error.errno or 0)}."
    holder = port_holder(port)
    by = f" by {holder.name} (process {holder.pid})" if holder else ""
    return f"Port {port} is in use{by}: end it, or choose another with --port."


def port_holder(port: int) -> Holder | None:
    """The process that listens on `port`, where the system tells."""
    look = {"linux": _holder_by_proc, "darwin": _holder_by_lsof}.get(sys.platform)
    return look(port) if look else None


def _holder_by_proc(port: int, proc: Path = Path("/proc")) -> Holder | None:
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:  # columns: slot, local address, remote, state (0A listens), …, inode
            columns = line.split()
            if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{columns[9]}]")
    for link in glob.iglob(f"{proc}/[0-9]*/fd/*") if inodes else ():
        try:
            if os.readlink(link) in inodes:
                process = Path(link).parent.parent
                return Holder(int(process.name), (process / "comm").read_text().strip())
        except OSError:
            continue
    return None


def _holder_by_lsof(port: int) -> Holder | None:
    try:
        command = ["lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_lsof(told)


def parse_lsof(told: str) -> Holder | None:
    """The first process in the output of `lsof -Fpc`: a line 'p<pid>', then a line 'c<command>'."""
    match = re.search(r"^p(\d+)\n(?:[^pc].*\n)*c(.+)$", told, re.MULTILINE)
    return Holder(int(match[1]), match[2]) if match else None


def programs() -> list[tuple[int, str]]:
    """(pid, command line) of every process that the system lets us see."""
    if sys.platform != "linux":
        command = ["ps", "-axo", "pid=,command="]
        return parse_ps(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append((int(path.parent.name), path.read_text(errors="replace").replace("\0", " ")))
    return found


def parse_ps(told: str) -> list[tuple[int, str]]:
    """The output of `ps -o pid=,command=`."""
    lines = (line.strip().partition(" ") for line in told.splitlines())
    return [(int(pid), command.strip()) for pid, _, command in lines if pid.isdigit()]
