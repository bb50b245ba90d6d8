"""JSON from strangers: one object, or a reason why not."""

from __future__ import annotations

import json
from typing import Any

_MAX_SHOWN = 120


class NotStrictJson(ValueError):
    """The text is not one plain JSON object; the message says why, without quoting it at length."""


def parse_object(data: bytes) -> dict[str, Any]:
    """The object ``data`` holds, with the order of its keys.

    Raises NotStrictJson for anything but UTF-8 without a byte-order mark, for NaN and Infinity,
    for a key given twice in one object, and for nesting or integers too large to read. The caller
    bounds ``len(data)``.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except NotStrictJson:
        raise
    except UnicodeDecodeError:
        raise NotStrictJson("it is not UTF-8") from None
    except RecursionError:
        raise NotStrictJson("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise NotStrictJson(f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ValueError:
        raise NotStrictJson("it holds an integer of thousands of digits") from None
    if not isinstance(value, dict):
        raise NotStrictJson("it is not an object")
    return value


def shown(value: object) -> str:
    """A value for an error message: on one line, printable, of bounded length."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise NotStrictJson(f"the key {shown(key)} is given twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> None:
    raise NotStrictJson(f"{name} is not JSON")
