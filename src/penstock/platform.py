"""What this machine is: the back end MLX has here, how its engine is started, who holds a port.

Each fact is read by the means of the system it belongs to: /proc and preloading are Linux's, `lsof` is
Darwin's, and neither is ever tried on the other. Never imports MLX: it looks at what is installed.
"""

from __future__ import annotations

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

_OPENBLAS = (
    "/usr/lib/{machine}-linux-gnu/openblas-pthread/libopenblas.so.0",
    "/usr/lib/{machine}-linux-gnu/libopenblas.so.0",
    "/usr/lib64/libopenblasp.so.0",
    "/usr/lib64/libopenblas.so.0",
    "/usr/lib/libopenblas.so.0",
    "/usr/local/lib/libopenblas.so.0",
)
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "1048576"}
OPENBLAS_HINT = "MLX's CPU matmul is 10 to 20 times slower without it: apt-get install libopenblas0-pthread"


def backend() -> str | None:
    """'metal', 'cuda' or 'cpu', by what is installed; None: MLX has no back end here."""
    if sys.platform == "darwin":
        return "metal"
    spec = importlib.util.find_spec("mlx")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not any((Path(place) / "lib" / "libmlx.so").is_file() for place in places):
        return None
    return "cuda" if any(_installed(name) for name in ("mlx-cuda-13", "mlx-cuda-12")) else "cpu"


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


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


def engine_environment(base: Mapping[str, str]) -> dict[str, str]:
    """The environment to start an engine with: `base`, and on Linux's CPU back end what MLX needs there.

    MLX's CPU wheel links a reference BLAS; a preloaded OpenBLAS answers its calls instead. glibc keeps what
    MLX frees (its thresholds grow with use), so that limits on processes count bytes that no ledger knows:
    with thresholds that are set, large arrays go back to the system when they are freed.
    """
    environment = dict(base)
    preloaded = environment.get("LD_PRELOAD", "")
    if sys.platform != "linux" or backend() != "cpu":
        return environment
    for name, value in _MALLOC.items():
        environment.setdefault(name, value)
    if "openblas" in preloaded:
        return environment
    library = openblas()
    if library is not None:
        environment["LD_PRELOAD"] = f"{library}:{preloaded}" if preloaded else library
    return environment


class PortProblem(Exception):
    """The port cannot be listened on. `exit_code` is 1 where a restart may mend it, else 2."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.exit_code = exit_code


@dataclass(frozen=True)
class Holder:
    """The process that listens on a port."""

    pid: int
    name: str


def listen(host: str, port: int, backlog: int = 1024) -> socket.socket:
    """A listening TCP socket. Raises PortProblem with one sentence."""
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise PortProblem(f"--host {host}: no such address.", 2) from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(backlog)
    except PermissionError:
        listener.close()
        raise PortProblem(
            f"Port {port} needs rights that this user has not got: take one above 1023.", 2
        ) from None
    except OSError as error:
        listener.close()
        raise PortProblem(_why_not(host, port, error), 1) from None
    return listener


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno != errno.EADDRINUSE:
        return f"{host}:{port} cannot be listened on: {error.strerror}."
    holder = port_holder(port)
    by = f" by {holder.name} (process {holder.pid})" if holder else ""
    return f"Port {port} is in use{by}: end it, or choose another with --port."


def port_holder(port: int) -> Holder | None:
    """The process that listens on `port`, where the system tells."""
    if sys.platform == "linux":
        return _holder_by_proc(port)
    if sys.platform == "darwin":
        return _holder_by_lsof(port)
    return None


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
