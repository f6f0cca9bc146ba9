"""Server processes under measurement: start, readiness, memory and CPU time of the whole tree, stop.

Owns each process it starts, in a process group of its own, and ends that group. Memory is what the system
says (Linux: resident and swapped pages, and VmHWM; macOS: the footprint), never what the server says of
itself; GPU memory is nvidia-smi's total less what was there before.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock import platform
from penstock.memory.probe import system_probe
from penstock.traffic.watch import below

PROBE = system_probe({})
LINUX = sys.platform == "linux"


def environment(*, gpu: bool) -> dict[str, str]:
    """The environment of every measured process: no hub, the same BLAS for all."""
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if (blas := platform.openblas()) and not gpu:
        found["LD_PRELOAD"] = blas
    return found


def command(system: str, model: Path, port: int) -> list[str]:
    """How a server is started: with its defaults."""
    common = ["--host", "127.0.0.1", "--port", str(port)]
    if system == "mlx_lm.server":
        return [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), *common]
    program = "import sys; from penstock.cli import main; sys.exit(main())"
    return [sys.executable, "-c", program, "serve", str(model), *common]


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Sample:
    """One look at a tree: resident bytes of all its processes, CPU seconds of its first, GPU bytes."""

    at: float
    resident: int
    front_cpu: float
    device: int


class Server:
    """A running server. `with Server(...) as server:` ends it, whatever happens."""

    def __init__(
        self,
        system: str,
        model: Path,
        log: Path,
        *,
        gpu: bool = False,
        data_limit: int | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """`data_limit`: RLIMIT_DATA in bytes for each process of the tree; `options` beside the defaults."""
        self.options = options
        self.system, self.model, self.log, self.gpu = system, model, log, gpu
        self.data_limit = data_limit
        self.port = free_port()
        self.samples: list[Sample] = []
        self._stop = threading.Event()
        self._device_before = device_bytes() if gpu else 0

    def __enter__(self) -> Server:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command(self.system, self.model, self.port), *self.options],
                env=environment(gpu=self.gpu),
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=self._limit,  # noqa: PLW1509 - nothing else runs here yet
            )
        self._watch = threading.Thread(target=self._sample, daemon=True)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watch.join()
        for kill in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, kill)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(3)

    def _limit(self) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self.data_limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (self.data_limit, self.data_limit))

    def wait_ready(self, timeout: float = 300.0) -> None:
        """Until /health says 200. Raises RuntimeError with the log's end if it dies or never does."""
        end = time.monotonic() + timeout
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).close()
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.system} did not come up:\n{self.log.read_text()[-2000:]}")

    def pids(self) -> list[int]:
        """The tree, the first process first."""
        return [self.process.pid, *below(self.process.pid)]

    def reset_peak(self) -> None:
        """Forgets VmHWM, so that the next peak is of what follows (Linux)."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        """The sum of the processes' own peaks since `reset_peak` (an upper bound of the tree's), in bytes."""
        if not LINUX:
            return max(sample.resident for sample in self.samples)
        return sum(_status(pid, "VmHWM") for pid in self.pids())

    def _sample(self) -> None:
        while not self._stop.wait(0.3 if self.gpu else 0.05):
            pids = self.pids()
            device = device_bytes() - self._device_before if self.gpu else 0
            self.samples.append(Sample(time.monotonic(), resident(pids), cpu_seconds(pids[0]), device))


def resident(pids: list[int]) -> int:
    """What the system charges to the processes together (pages they share count for each)."""
    return sum(PROBE.read(pid).footprint or 0 for pid in pids)


def _status(pid: int, key: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return 1024 * int(line.split()[1])
    return 0


def cpu_seconds(pid: int) -> float:
    """CPU time of a process's threads, in nanosecond steps (Linux); 0 where the system doesn't tell."""
    total = 0
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def device_bytes() -> int:
    """GPU memory in use on the first device, by all processes."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    with contextlib.suppress(FileNotFoundError, ValueError):
        return int(subprocess.run(query, capture_output=True, text=True, check=False).stdout) << 20
    return 0


def send_load(
    port: int, requests: list[dict[str, object]], timeout: float = 600.0
) -> list[dict[str, object]]:
    """Runs the load generator as a process of its own and returns its answers."""
    spec = {"host": "127.0.0.1", "port": port, "requests": requests}
    done = subprocess.run(
        [sys.executable, "-m", "bench.load"],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        check=True,
        timeout=timeout,
    )
    answers: list[dict[str, object]] = json.loads(done.stdout)
    return answers
