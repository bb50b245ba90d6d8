"""Everything this client raises on purpose, and which error of the server becomes which class.

LoramuxClientError
├─ AdapterFilesError              local: no adapter at that path, or an archive not to be trusted
├─ ConnectionFailedError          no answer began: not reached, refused, or dropped
├─ RequestTimeoutError            no answer within the timeout
├─ IncompleteResponseError        an answer or stream began and was cut off
├─ InvalidResponseError           an answer that is not what a loramux server says
└─ APIError                       the server said no: ``status``, ``code``, ``param`` ...
   ├─ InvalidRequestError         400, and below it the other 4xx by name
   └─ ServerError                 5xx
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class LoramuxClientError(Exception):
    """Base of every error this client raises on purpose."""


class AdapterFilesError(LoramuxClientError):
    """The path to push holds no adapter, more than one, or is an archive not to be trusted."""


class ConnectionFailedError(LoramuxClientError):
    """The server could not be reached, or closed the connection before an answer began."""


class RequestTimeoutError(LoramuxClientError):
    """No answer came within the timeout. The server may still have done what was asked."""


class IncompleteResponseError(LoramuxClientError):
    """An answer began and did not end: the connection broke, or a stream had no ``[DONE]``."""


class InvalidResponseError(LoramuxClientError):
    """The answer is not what a loramux server sends (a proxy, another service, a wrong URL)."""


class APIError(LoramuxClientError):
    """The server answered with an error; subclasses say which.

    ``status`` is the HTTP status, None for an error inside a stream. ``code``, ``type`` and
    ``param`` are the server's. ``retry_after_s`` is how long it asked to wait. ``body`` is the
    whole ``error`` object, unknown fields included.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        type: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.type = type
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.body = dict(body or {})

    def __str__(self) -> str:
        about = [str(part) for part in (self.status, self.code) if part is not None]
        if self.request_id:
            about.append(f"request {self.request_id}")
        return f"{self.message} ({', '.join(about)})" if about else self.message


class InvalidRequestError(APIError):
    """A field is malformed or out of range; ``param`` names it."""


class RequestTooLargeError(InvalidRequestError):
    """The request would not fit the server's memory even if it ran alone."""


class ContextLengthExceededError(InvalidRequestError):
    """Prompt and requested output do not fit the model's context."""


class AuthenticationError(APIError):
    """No API key, or not a valid one."""


class PermissionDeniedError(APIError):
    """The API key may not do this."""


class QuotaExceededError(PermissionDeniedError):
    """The tenant has as many adapters, or bytes of them, as it may."""


class NotFoundError(APIError):
    """No such model, adapter or route."""


class GenerationGoneError(NotFoundError):
    """The adapter exists, that generation of it does not any more."""


class ConflictError(APIError):
    """The state of the named thing forbids the request."""


class GenerationConflictError(ConflictError):
    """The adapter's name already holds other weights."""


class RevisionConflictError(ConflictError):
    """The alias was changed, made or removed meanwhile."""


class AdapterAliasedError(ConflictError):
    """An alias stands for the adapter: point it elsewhere before you delete the adapter."""


class AdapterNotReadyError(ConflictError):
    """The adapter is still being validated; ``retry_after_s`` says when to ask again."""


class AdapterFailedError(ConflictError):
    """The adapter did not pass validation and cannot be used."""


class AdapterIncompatibleError(ConflictError):
    """The adapter was uploaded for another base model."""


class PayloadTooLargeError(InvalidRequestError):
    """A body or file is over the server's limit."""


class UnsupportedMediaTypeError(InvalidRequestError):
    """The content type is not one the route takes."""


class AdapterInvalidError(APIError):
    """The adapter cannot be served exactly as trained; ``problems`` lists every reason."""

    @property
    def problems(self) -> list[str]:
        return list(self.body.get("problems", ()))

    def __str__(self) -> str:
        return "\n  - ".join([super().__str__(), *self.problems])


class RateLimitedError(APIError):
    """This caller has too much in flight; ``retry_after_s`` says when to ask again."""


class ServerError(APIError):
    """The request was fine; the server could not serve it."""


class EngineFailedError(ServerError):
    """An accepted request could not be finished."""


class PoisonRequestError(EngineFailedError):
    """The server's engine died of the request each time it was tried: do not send it again."""


class NumericalError(EngineFailedError):
    """What the model computed for the request is not finite."""


class AdapterLoadFailedError(ServerError):
    """The server has the adapter but could not bring it into memory."""


class OverloadedError(ServerError):
    """No room now, or still starting; ``retry_after_s`` says when to ask again."""


class DeadlineExceededError(ServerError):
    """The request's own deadline passed before it was done."""


class StorageFullError(ServerError):
    """The server's disk has no room for the upload."""


ERRORS: dict[str, type[APIError]] = {
    "adapter_aliased": AdapterAliasedError,
    "adapter_failed": AdapterFailedError,
    "adapter_incompatible": AdapterIncompatibleError,
    "adapter_invalid": AdapterInvalidError,
    "adapter_load_failed": AdapterLoadFailedError,
    "adapter_not_ready": AdapterNotReadyError,
    "config_error": ServerError,
    "context_length_exceeded": ContextLengthExceededError,
    "deadline_exceeded": DeadlineExceededError,
    "engine_failed": EngineFailedError,
    "generation_conflict": GenerationConflictError,
    "generation_gone": GenerationGoneError,
    "insufficient_scope": PermissionDeniedError,
    "internal_error": ServerError,
    "invalid_api_key": AuthenticationError,
    "invalid_request": InvalidRequestError,
    "model_not_found": NotFoundError,
    "numerical_error": NumericalError,
    "overloaded": OverloadedError,
    "payload_too_large": PayloadTooLargeError,
    "poison_request": PoisonRequestError,
    "quota_exceeded": QuotaExceededError,
    "rate_limit_exceeded": RateLimitedError,
    "request_too_large": RequestTooLargeError,
    "revision_conflict": RevisionConflictError,
    "storage_full": StorageFullError,
    "unsupported_media_type": UnsupportedMediaTypeError,
    "upload_offset_mismatch": ConflictError,
}
"""Server ``code`` -> class. A code not listed goes by the HTTP status, then by its ``type``."""

_BY_TYPE: dict[str, type[APIError]] = {
    "adapter_invalid": AdapterInvalidError,
    "authentication_error": AuthenticationError,
    "conflict_error": ConflictError,
    "invalid_request_error": InvalidRequestError,
    "not_found_error": NotFoundError,
    "overloaded_error": OverloadedError,
    "permission_error": PermissionDeniedError,
    "rate_limit_error": RateLimitedError,
    "server_error": ServerError,
    "storage_error": StorageFullError,
    "timeout_error": DeadlineExceededError,
}

_BY_STATUS: dict[int, type[APIError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: PayloadTooLargeError,
    415: UnsupportedMediaTypeError,
    429: RateLimitedError,
    503: OverloadedError,
    504: DeadlineExceededError,
    507: StorageFullError,
}


def api_error(
    error: Mapping[str, Any],
    *,
    status: int | None = None,
    request_id: str | None = None,
    retry_after_s: float | None = None,
) -> APIError:
    """The exception for one ``error`` object of the server: by code, else status, else type.

    ``error`` may be anything a proxy in between has made of it, an empty object included.
    """
    code, kind, param = (
        value if isinstance(value := error.get(key), str) else None
        for key in ("code", "type", "param")
    )
    fallback = ServerError if status is None or status >= 500 else APIError
    cls = ERRORS.get(code or "") or _BY_STATUS.get(status or 0) or _BY_TYPE.get(kind or "")
    message = error.get("message")
    return (cls or fallback)(
        message if isinstance(message, str) else "the server gave no reason",
        status=status,
        code=code,
        type=kind,
        param=param,
        request_id=request_id,
        retry_after_s=retry_after_s,
        body=error,
    )
