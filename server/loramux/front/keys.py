"""Who may ask: API keys, the tenants they belong to, and what each tenant may use.

    <data_dir>/keys.json    {"version": 1, "keys": [Key, ...], "tenants": {name: Limits}}

A key is ``lmx_<id>_<secret>``. The id is public and names the key in lists; of the secret only its
SHA-256 is stored. Slow password hashes are for secrets that can be guessed: 256 random bits cannot.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec

from loramux.config import ADAPTER_NAME, ServerConfig
from loramux.errors import ConfigError

log = logging.getLogger(__name__)

Scope = Literal["infer", "upload", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
VERSION: Literal[1] = 1
CHECK_S = 1.0
"""How often a server looks for a changed file: a revoked key works no longer than this."""

_KEY = re.compile(r"lmx_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
_Tenant = Annotated[str, msgspec.Meta(pattern=rf"^{ADAPTER_NAME.pattern}\Z")]
_Limit = Annotated[int, msgspec.Meta(ge=0)] | None
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)] | None


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key as stored; ``hash`` is the SHA-256 of its secret, in hex."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}\Z")]
    hash: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    tenant: _Tenant
    scopes: tuple[Scope, ...]
    created: datetime
    note: str = ""
    revoked: datetime | None = None


class Limits(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What one tenant may use at most; None for no limit.

    ``max_adapters`` counts generations (and, by themselves, failed adapters), ``max_adapter_bytes``
    their stored weights and heads and what waits for an adapter, ``max_requests`` choices in
    flight, ``tokens_per_minute`` prompt and output tokens together; ``max_pool_share`` is the part
    of the memory pool that the KV of running requests may take.
    """

    max_adapters: _Limit = None
    max_adapter_bytes: _Limit = None
    max_requests: _Limit = None
    tokens_per_minute: _Limit = None
    max_pool_share: _Share = None


class KeysFile(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    version: Literal[1] = VERSION
    keys: list[Key] = []
    tenants: dict[_Tenant, Limits] = {}


NO_LIMITS = Limits()
_NOBODY = Key(id="0" * 8, hash="0" * 64, tenant="nobody", scopes=(), created=datetime.now(UTC))
"""Compared against when no key has the id, so that time does not tell which ids exist."""


def new_key(tenant: str, scopes: tuple[Scope, ...], note: str = "") -> tuple[Key, str]:
    """A fresh key as stored, and its text, which exists nowhere else."""
    key_id, secret = secrets.token_hex(4), secrets.token_urlsafe(32)
    key = Key(
        id=key_id,
        hash=_hash(secret),
        tenant=tenant,
        scopes=scopes,
        created=datetime.now(UTC).replace(microsecond=0),
        note=note,
    )
    return key, f"lmx_{key_id}_{secret}"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def read(path: Path) -> KeysFile | None:
    """What the file holds; None when there is none. Raises ConfigError when it cannot be used."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"the keys file {path} cannot be read: {error.strerror}") from error
    return parse(raw, path)


def parse(raw: bytes, path: Path) -> KeysFile:
    """``read`` without the reading; ``path`` is for the message."""
    try:
        content: Any = msgspec.json.decode(raw)
        version = content.get("version") if isinstance(content, dict) else None
        if isinstance(version, int) and version != VERSION:
            raise ConfigError(
                f"the keys file {path} has version {version}; this server knows {VERSION}"
            )
        if version is None:
            raise ValueError("it has no version")
        found = msgspec.convert(content, KeysFile)
        if len({key.id for key in found.keys}) != len(found.keys):
            raise ValueError("two keys have the same id")
    except ValueError as error:  # msgspec's errors are among them
        raise ConfigError(f"the keys file {path} is malformed: {error}") from error
    return found


@contextmanager
def editing(path: Path) -> Iterator[KeysFile]:
    """The file's content, to be changed; written back whole, atomically, for its owner alone.

    Editors take turns. Raises ConfigError when the file cannot be used or written; then, and when
    the caller raises, it stays as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            content = read(path) or KeysFile()
            yield content
            _write(path, content)
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ConfigError(f"the keys file {path} cannot be written: {error.strerror}") from error


def _write(path: Path, content: KeysFile) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(handle, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Keys:
    """The keys of a running server; follows the file as it changes.

    Raises ConfigError when the file is there and cannot be used, or is not there and ``required``.
    Later on, a file that cannot be used or went missing leaves the last good one in force.
    """

    def __init__(
        self, path: Path, *, required: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path, self._clock = path, clock
        self._keys: dict[str, Key] = {}
        self._tenants: dict[str, Limits] = {}
        self._guarded = False
        self._signature = self._stat()
        self._checked_at = clock()
        content = read(path)
        if content is not None:
            self._use(content)
        elif required:
            raise ConfigError(f"--api-keys {path}: no such file; loramux keys create makes it")

    @classmethod
    def of(cls, config: ServerConfig) -> Keys:
        """The keys a server with this configuration asks for."""
        return cls(config.keys_file, required=config.api_keys is not None)

    @property
    def guarded(self) -> bool:
        """Whether a key is needed: true once there was a live one. Revoking the last key of a
        running server must not open it."""
        self._follow()
        return self._guarded

    def find(self, text: str) -> Key | None:
        """The live key with this text; None for any other, after the same work."""
        self._follow()
        match = _KEY.fullmatch(text)
        key_id, secret = match.groups() if match else ("", text)
        key = self._keys.get(key_id, _NOBODY)
        same = hmac.compare_digest(_hash(secret), key.hash)
        return key if same and key.revoked is None else None

    def limits(self, tenant: str) -> Limits:
        """What the tenant may use."""
        return self._tenants.get(tenant, NO_LIMITS)

    def _use(self, content: KeysFile) -> None:
        self._keys = {key.id: key for key in content.keys}
        self._tenants = content.tenants
        self._guarded = self._guarded or any(key.revoked is None for key in content.keys)

    def _follow(self) -> None:
        now = self._clock()
        if now - self._checked_at < CHECK_S:
            return
        self._checked_at = now
        signature = self._stat()
        if signature == self._signature:
            return
        # Taken before reading: a change in between is seen the next time.
        self._signature = signature
        try:
            content = read(self._path)
            if content is None:
                raise ConfigError(f"the keys file {self._path} is gone")
        except ConfigError as error:
            log.error("%s; the keys read before stay in force", error.message)
        else:
            self._use(content)
            log.info("read the keys file again: %d keys", len(content.keys))

    def _stat(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_ino, status.st_size)
