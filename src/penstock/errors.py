"""The one error table: every failure a client can see, with its status, retryability and metric label.

Nothing else in the package chooses an HTTP status. A failure is a `PenstockError` that carries a `Kind`;
`api` renders it in the shape of the API that was called (OpenAI's here, Anthropic's on /v1/messages).

    PenstockError
      kind     -> a row of the table (status, OpenAI type, code, retryable, label)
      message  -> one sentence for people; never a traceback, never prompt text
      param    -> the path of the field at fault ("messages[2].content"), or None
  sizes    -> of a prompt that can never fit: its tokens and the most that there may be
      retry_after -> whole seconds, for retryable kinds

Only kinds whose code is `context_length_exceeded` may speak of context length: agents compress their
history when they read it. A passing shortage says 'busy, retry'.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the error table."""

    status: int
    type: str
    code: str | None
    retryable: bool = False


class Kind(Enum):
    """Every kind of failure. The name in lower case is its label in metrics and logs."""

    INVALID_JSON = Row(400, "invalid_request_error", "invalid_json")
    INVALID_FIELD = Row(400, "invalid_request_error", "invalid_value")
    UNSUPPORTED_FIELD = Row(400, "invalid_request_error", "unsupported_parameter")
    CONTEXT_LENGTH = Row(400, "invalid_request_error", "context_length_exceeded")
    TEMPLATE = Row(400, "invalid_request_error", "chat_template_error")
    CANCELLED = Row(400, "request_cancelled", "request_cancelled")
    """By the operator. No status of those that clients try again on."""
    UNAUTHORIZED = Row(401, "authentication_error", "invalid_api_key")
    FORBIDDEN_HOST = Row(403, "permission_error", "host_not_allowed")
    FORBIDDEN_ORIGIN = Row(403, "permission_error", "origin_not_allowed")
    NOT_FOUND = Row(404, "invalid_request_error", "not_found")
    MODEL_NOT_FOUND = Row(404, "invalid_request_error", "model_not_found")
    METHOD = Row(405, "invalid_request_error", "method_not_allowed")
    TIMEOUT = Row(408, "invalid_request_error", "request_timeout", retryable=True)
    TOO_LARGE = Row(413, "invalid_request_error", "request_too_large")
    MEDIA_TYPE = Row(415, "invalid_request_error", "unsupported_media_type")
    HEADERS_TOO_LARGE = Row(431, "invalid_request_error", "headers_too_large")
    BUSY = Row(503, "overloaded_error", "server_busy", retryable=True)
    LOADING = Row(503, "overloaded_error", "model_loading", retryable=True)
    SHUTTING_DOWN = Row(503, "overloaded_error", "shutting_down", retryable=True)
    ENGINE_HALTED = Row(503, "server_error", "engine_halted")
    ENGINE_DIED = Row(500, "server_error", "engine_died", retryable=True)
    OUT_OF_MEMORY = Row(500, "server_error", "out_of_memory", retryable=True)
    INTERNAL = Row(500, "server_error", "internal_error")

    @property
    def label(self) -> str:
        """The kind's name in metrics and logs."""
        return self.name.lower()


class PenstockError(Exception):
    """A failure that a client is told about. Raised anywhere in the front; rendered by `api`."""

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        sizes: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.sizes = sizes
        self.retry_after = retry_after if retry_after is not None else (1 if kind.value.retryable else None)

    def openai(self) -> dict[str, dict[str, str | None]]:
        """The error body of OpenAI's APIs."""
        row = self.kind.value
        return {"error": {"message": self.message, "type": row.type, "param": self.param, "code": row.code}}

    def anthropic(self) -> dict[str, Any]:
        """The error body of Anthropic's API; agents compress their history on its words for a long prompt."""
        status, message = self.kind.value.status, self.message
        if self.sizes:
            message = f"prompt is too long: {self.sizes[0]} tokens > {self.sizes[1]} maximum. {message}"
        kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}}


_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


class StartProblem(Exception):
    """Why a command ends before it has begun, in one sentence.

    `exit_code` is 2 where only the user can mend it, 1 where a restart may.
    """

    def __init__(self, sentence: str, exit_code: int = 2) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code
