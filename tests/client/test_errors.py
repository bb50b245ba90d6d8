"""From the server's words to the client's classes."""

from __future__ import annotations

import inspect

import pytest

import loramux_client
from loramux import errors as server
from loramux_client import (
    ERRORS,
    AdapterInvalidError,
    APIError,
    ConflictError,
    GenerationGoneError,
    InvalidRequestError,
    LoramuxClientError,
    NotFoundError,
    ServerError,
)
from loramux_client._errors import api_error


def server_errors() -> list[type[server.LoramuxError]]:
    classes = [c for _, c in inspect.getmembers(server, inspect.isclass)]
    return [c for c in classes if issubclass(c, server.LoramuxError)]


@pytest.mark.parametrize("cls", server_errors(), ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("in_stream", [False, True])
def test_every_server_error_has_its_class_and_an_unknown_code_a_wider_one(
    cls: type[server.LoramuxError], in_stream: bool
) -> None:
    status = None if in_stream else cls.status
    known = api_error({"code": cls.code, "type": cls.type}, status=status)
    assert type(known) is ERRORS[cls.code] is not APIError
    unknown = api_error({"code": "of a newer server", "type": cls.type}, status=status)
    assert type(unknown) is not APIError and isinstance(known, type(unknown))


@pytest.mark.parametrize(
    ("status", "expected"),
    [(400, InvalidRequestError), (404, NotFoundError), (409, ConflictError), (418, APIError)]
    + [(status, ServerError) for status in (500, 502, 503, 504, 507, 599)],
)
def test_without_code_and_type_the_status_decides(status: int, expected: type[APIError]) -> None:
    assert isinstance(api_error({}, status=status), expected)


@pytest.mark.parametrize("odd", [400, None, [], {}, True])
def test_odd_values_in_the_error_object_do_not_matter(odd: object) -> None:
    error = api_error({"code": odd, "type": odd, "param": odd, "message": odd}, status=404)
    assert isinstance(error, NotFoundError)
    assert (error.code, error.param) == (None, None) and "gave no reason" in str(error)


def test_a_missing_route_is_not_found_whatever_its_type() -> None:
    error = {"code": "route_not_found", "type": "invalid_request_error"}
    assert isinstance(api_error(error, status=404), NotFoundError)


def test_what_an_error_carries_and_says() -> None:
    body = {"message": "m", "type": "not_found_error", "param": "model", "code": "generation_gone"}
    error = api_error({**body, "new": 1}, status=404, request_id="r1", retry_after_s=2.0)
    assert isinstance(error, GenerationGoneError) and isinstance(error, NotFoundError)
    assert (error.param, error.type, error.retry_after_s) == ("model", "not_found_error", 2.0)
    assert error.body == {**body, "new": 1}
    assert str(error) == "m (404, generation_gone, request r1)"


def test_all_problems_of_an_adapter_are_shown() -> None:
    error = api_error({"code": "adapter_invalid", "message": "no", "problems": ["a", "b"]})
    assert isinstance(error, AdapterInvalidError)
    assert error.problems == ["a", "b"]
    assert str(error).splitlines() == ["no (adapter_invalid)", "  - a", "  - b"]


def test_public_names_are_sorted_and_every_error_is_among_them() -> None:
    names = loramux_client.__all__
    assert names == sorted(names) and len(set(names)) == len(names)
    assert all(hasattr(loramux_client, name) for name in names)
    module = inspect.getmodule(LoramuxClientError)
    for name, cls in inspect.getmembers(module, inspect.isclass):
        if issubclass(cls, LoramuxClientError):
            assert name in names
