"""What is open, and what it tells: paths behind the key, nothing to load or fetch, no details, no prompts."""

from __future__ import annotations

import json
import os
import re
import socket
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_backend import say, serving
from tests.support.raw_http import raw
from tests.support.whole_server import ROOT, WholeServer

from penstock.api.app import ENDPOINTS
from penstock.config import Options
from penstock.models import DEMO

CHAT = "/v1/chat/completions"
MESSAGE = {"role": "user", "content": "hi"}
BODY: dict[str, Any] = {"messages": [MESSAGE], "max_tokens": 1}
FOREIGN = [
    *("/api/pull", "/api/create", "/api/generate", "/api/tags", "/slots", "/props", "/lora-adapters"),
    *("/v1/load_lora_adapter", "/update_weights", "/get_server_info", "/flush_cache", "/reset_prefix_cache"),
    *("/invocations", "/engines", "/admin", "/v1/cache", "/docs", "/redoc", "/.env"),
]


def test_every_path_needs_the_key_but_that_of_health_and_files_that_hold_no_data() -> None:
    """Routes that were forgotten, those of caches among them [Rapid-MLX#737, omlx#929]."""
    page = resources.files("penstock.dashboard")
    files = {f"/dashboard/{file.name}": file for file in page.iterdir() if file.name != "index.html"}
    with serving(options=Options(port=0, api_key=("secret",))) as server:
        paths = [re.sub("{.*}", "alias", path) for path in ENDPOINTS]
        for path in [*paths, *FOREIGN]:
            for method in ("GET", "POST", "PUT", "DELETE"):
                status, _, body = raw(server.port, method, path, BODY)
                if path == "/health":
                    assert status in (200, 405)
                elif path == "/" and method == "GET":
                    assert json.loads(body) == {"server": "penstock", "model": "org/fake", "api": "/v1"}
                elif path in files and method == "GET":
                    assert body == files[path].read_bytes()
                else:
                    assert status == (405 if path == "/" or path in files else 401), (method, path, status)
        assert not server.backend.runs


def test_a_key_in_the_address_is_none_and_is_not_logged(tmp_path: Path) -> None:
    """[omlx#926, omlx#1440]"""
    with WholeServer(DEMO, tmp_path, "--api-key", "its-key", "--log-level", "DEBUG") as server:
        for query in ("?api_key=its-key", "?key=its-key", "?access_token=its-key"):
            assert raw(server.port, "GET", f"/v1/models{query}")[0] == 401
            assert raw(server.port, "POST", f"{CHAT}{query}", BODY)[0] == 401
    assert "its-key" not in server.log()


@pytest.mark.parametrize("path", FOREIGN)
def test_nothing_can_be_loaded_pulled_or_flushed(target: WholeServer, path: str) -> None:
    """[CVE-2026-28400, CVE-2026-5530, CVE-2026-7020, CVE-2024-37032]"""
    assert raw(target.port, "POST", path, {"name": "org/model", "path": "/etc/passwd"})[0] == 404


def test_a_models_name_is_no_path_and_no_repository(target: WholeServer, tmp_path: Path) -> None:
    """A pipe stands for the file: who opened it to read would wait for ever [CVE-2026-5843 and its kin]."""
    pipe = tmp_path / "config.json"
    os.mkfifo(pipe)
    for name in (
        str(pipe),
        str(tmp_path),
        f"file://{pipe}",
        "../" * 12 + str(pipe)[1:],
        "org/other-model",
        "\x00",
    ):
        status, _, answer = raw(target.port, "POST", CHAT, {**BODY, "model": name})
        assert status == 200, answer
        for field in ("adapters", "draft_model"):
            assert raw(target.port, "POST", CHAT, {**BODY, field: name})[0] == 400
    for path in (
        "/v1/models/../../../etc/passwd",
        "/v1/models/%2e%2e/%2e%2e/etc/passwd",
        f"/v1/models/{pipe}",
    ):
        status, _, answer = raw(target.port, "GET", path)
        assert status == 404
        assert b"root:" not in answer
    with pytest.raises(OSError, match="No such device"):  # nobody has it open to read
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)


def test_no_address_in_a_request_is_ever_fetched(target: WholeServer) -> None:
    """Images, files, references of schemas: the server they name hears nothing [CVE-2026-5530; SSRF]."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "image_url", "image_url": url},
            {"type": "input_image", "image_url": url},
            {"type": "input_audio", "input_audio": {"data": url}},
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "file", "file": {"file_data": url}},
        ]
        for part in parts:
            status, _, _ = raw(target.port, "POST", CHAT, {"messages": [{"role": "user", "content": [part]}]})
            assert status == 400, part
        for source in ({"type": "url", "url": url}, {"type": "base64", "data": url}):
            blocks = [{"type": kind, "source": source} for kind in ("image", "document")]
            body = {"messages": [{"role": "user", "content": blocks}], "max_tokens": 1}
            assert raw(target.port, "POST", "/v1/messages", body)[0] == 400
        function = {
            "name": "f",
            "parameters": {"$ref": url, "$schema": url, "properties": {"a": {"$ref": url}}},
        }
        raw(target.port, "POST", CHAT, {**BODY, "tools": [{"type": "function", "function": function}]})
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"$ref": url}}}
        raw(target.port, "POST", CHAT, {**BODY, "response_format": form})
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_clients_request_id_is_not_ours(target: WholeServer) -> None:
    """Two requests of one id would be one to whoever files them by it [PYSEC-2026-4198]."""
    ids = set()
    for _ in range(2):
        status, headers, answer = raw(target.port, "POST", CHAT, BODY, {"X-Request-Id": "mine-and-mine"})
        assert status == 200
        assert b"mine-and-mine" not in answer
        ids.add(headers["x-request-id"])
    assert len(ids) == 2
    assert "mine-and-mine" not in ids
    assert "mine-and-mine" not in target.log()


def test_answers_and_errors_give_no_details_away(target: WholeServer) -> None:
    """No software in a header, no build in an answer, no path of this machine, no trace [CVE-2026-22773]."""
    asked = [
        raw(target.port, "POST", CHAT, BODY),
        raw(target.port, "POST", CHAT, {**BODY, "logit_bias": {"x": 1}}),
        raw(target.port, "POST", CHAT, b"{"),
        raw(target.port, "GET", "/v1/models"),
        raw(target.port, "GET", "/health"),
        raw(target.port, "GET", "/v1/status"),
        raw(target.port, "GET", "/nothing"),
        raw(target.port, "GET", "/"),
    ]
    for _, headers, answer in asked:
        assert "server" not in headers
        assert b"fingerprint" not in answer
        assert b"Traceback" not in answer
        assert not re.search(rb'File \\?"', answer)
        assert str(ROOT).encode() not in answer
        assert str(DEMO).encode() not in answer


def test_a_fault_of_ours_tells_the_log_and_not_the_client() -> None:
    async def fault(run: Any) -> None:
        raise RuntimeError("a secret of the inside")

    with serving(say("x")) as server, server.client() as client:
        server.service.backend.open = lambda job: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        answer = client.post(CHAT, json=BODY)
    assert answer.status_code == 500
    assert "division" not in answer.text
    assert answer.json()["error"]["code"] == "internal_error"


def test_no_text_of_a_prompt_is_logged(target: WholeServer) -> None:
    """At any level, of requests that are answered and of those that are refused."""
    secret = "the-password-is-swordfish"
    for body in (
        {"messages": [{"role": "user", "content": secret}], "max_tokens": 2},
        {"messages": [{"role": "user", "content": secret}], "temperature": "warm"},
        {"messages": [{"role": secret, "content": secret}], "max_tokens": 2},
        {"messages": [{"role": "user", "content": secret}], "tools": [{"function": {"name": ""}}]},
    ):
        raw(target.port, "POST", CHAT, body)
    raw(target.port, "POST", CHAT, b'{"messages":[{"role":"user","content":"' + secret.encode())
    raw(target.port, "POST", "/tokenize", {"content": secret})
    assert secret not in target.log()
