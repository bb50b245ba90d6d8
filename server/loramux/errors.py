"""Every way loramux says no, with the status and code a client sees.

    LoramuxError                       one base: a caller can catch all of ours
    ├─ ConfigError                     at start-up: a flag, a checkpoint, a data directory
    ├─ RequestError              4xx   the request is wrong, and asking again changes nothing
    │  ├─ InvalidRequest         400   a field is malformed or out of range (``param`` names it)
    │  ├─ ContextLengthExceeded  400   prompt + max_tokens cannot fit
    │  ├─ RequestTooLarge        400   its KV and its adapters cannot fit the memory pool
    │  ├─ Unauthenticated        401   no key, or none that works
    │  ├─ PermissionDenied       403   the key may not do this
    │  ├─ QuotaExceeded          403   the tenant has as many adapters, or bytes, as it may
    │  ├─ NotFound               404   no such model, adapter or blob
    │  ├─ GenerationGone         404   that generation of the adapter no longer exists
    │  ├─ Conflict               409   a name holds other weights; an adapter is not in that state
    │  │  └─ UploadOffsetConflict     a part of an upload begins elsewhere than the upload ends
    │  ├─ PayloadTooLarge        413   a body, file or header is over its limit
    │  ├─ UnsupportedMediaType   415   not JSON (or multipart) where that is needed
    │  └─ AdapterInvalid         422   the upload cannot be served exactly; ``problems`` lists all
    └─ ServiceError                    the request was fine; the server could not serve it
       ├─ Overloaded             503   full or starting: ask again after ``retry_after_s``
       ├─ RateLimited            429   this caller has too much in flight
       ├─ EngineFailed           500   the request was accepted and could not be finished
       │  ├─ PoisonRequest       500   every engine that computed it died of it
       │  └─ NumericalError      500   what the model computed for it is not finite
       ├─ AdapterLoadFailed      500   the adapter's stored form could not be brought into the pool
       ├─ DeadlineExceeded       504   the request's own deadline passed
       └─ StorageFull            507   the data directory has no room

``assert`` is for our own bugs; user input and files never meet one.
"""

from __future__ import annotations

from collections.abc import Sequence


class LoramuxError(Exception):
    """Base of every error loramux raises on purpose.

    ``status``, ``type`` and ``code`` are what HTTP answers; ``retry`` becomes ``x-should-retry``.
    """

    status = 500
    type = "server_error"
    code = "internal_error"
    retry: bool | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class ConfigError(LoramuxError):
    """The server cannot start as configured."""

    code = "config_error"


class RequestError(LoramuxError):
    """The request itself is wrong."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    retry = False


class InvalidRequest(RequestError):
    """A field is missing, malformed, out of range, or asks for what is not implemented."""


class ContextLengthExceeded(RequestError):
    """Prompt and requested output do not fit the model's context."""

    code = "context_length_exceeded"


class RequestTooLarge(RequestError):
    """The request would not fit the memory pool even if it ran alone."""

    code = "request_too_large"


class Unauthenticated(RequestError):
    """No key came, or none that is known and live: the answer does not say which."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(RequestError):
    """The key is good; this needs a scope that it lacks."""

    status = 403
    type = "permission_error"
    code = "insufficient_scope"


class QuotaExceeded(RequestError):
    """The caller's tenant has as much stored as it may."""

    status = 403
    type = "permission_error"
    code = "quota_exceeded"


class NotFound(RequestError):
    """The named model, adapter or blob does not exist (or is not the caller's to see)."""

    status = 404
    type = "not_found_error"
    code = "model_not_found"


class GenerationGone(NotFound):
    """The adapter exists, the asked generation does not any more."""

    code = "generation_gone"


class Conflict(RequestError):
    """The state of the named thing forbids the request."""

    status = 409
    type = "conflict_error"
    code = "generation_conflict"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_s = retry_after_s
        self.retry = retry_after_s is not None


class UploadOffsetConflict(Conflict):
    """A part of an upload does not begin where the upload stands: at ``upload_offset``."""

    code = "upload_offset_mismatch"

    def __init__(self, message: str, upload_offset: int, *, code: str | None = None) -> None:
        super().__init__(message, param="Upload-Offset", code=code)
        self.upload_offset = upload_offset


class PayloadTooLarge(RequestError):
    """A body, file or header is larger than its limit."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(RequestError):
    """The content type or encoding is not one this route takes."""

    status = 415
    code = "unsupported_media_type"


class AdapterInvalid(RequestError):
    """The adapter cannot be served exactly as trained.

    ``problems`` holds every offender found, not the first, so one upload is enough to learn all.
    """

    status = 422
    type = "adapter_invalid"
    code = "adapter_invalid"

    def __init__(
        self, message: str, *, problems: Sequence[str] = (), code: str | None = None
    ) -> None:
        super().__init__(message, param="adapter", code=code)
        self.problems = tuple(problems)


def in_short(problems: Sequence[str]) -> str:
    """Several problems as one message."""
    more = f"{len(problems)} problems; the first: " if len(problems) > 1 else ""
    return more + problems[0]


class ServiceError(LoramuxError):
    """The request was fine; the server could not serve it."""


class Overloaded(ServiceError):
    """No room now, or no engine yet."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"
    retry = True

    def __init__(self, message: str, *, code: str | None = None, retry_after_s: float = 1) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class RateLimited(ServiceError):
    """This caller has as much in flight as it may."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    retry = True

    def __init__(self, message: str, *, retry_after_s: float = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineFailed(ServiceError):
    """An accepted request could not be finished."""

    code = "engine_failed"


class PoisonRequest(EngineFailed):
    """Engines died of the request, twice with nothing else to compute."""

    code = "poison_request"
    retry = False


class NumericalError(EngineFailed):
    """The request's logits have a NaN or nothing finite: its adapter, or the machine, is at
    fault."""

    code = "numerical_error"


class AdapterLoadFailed(ServiceError):
    """The adapter's stored form is missing, damaged or unreadable."""

    code = "adapter_load_failed"


class DeadlineExceeded(ServiceError):
    """The request's deadline passed before it was done."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class StorageFull(ServiceError):
    """The data directory has no room for the upload."""

    status = 507
    type = "storage_error"
    code = "storage_full"
    retry = False
