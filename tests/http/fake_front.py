"""A front without processes: the real ledger, tokenizer and catalog, and an engine that says what a
script tells it to."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from msgspec.structs import replace

from loramux.adapters.registry import AdapterRow
from loramux.config import ServerConfig
from loramux.errors import (
    AdapterInvalid,
    Conflict,
    LoramuxError,
    NotFound,
    PayloadTooLarge,
)
from loramux.front.admission import Admission, Claim, Room
from loramux.front.aliases import AliasService
from loramux.front.catalog import AdapterView, Catalog
from loramux.front.generation import Generation, GenerationSpec
from loramux.front.keys import Keys
from loramux.front.ledger import Ledger
from loramux.front.observations import Observations
from loramux.front.quotas import Quotas
from loramux.front.tokenizer import TokenizerService
from loramux.front.voices import Voices
from loramux.request import Role
from loramux.wire import (
    BaseDescription,
    Failed,
    Finished,
    Output,
    Ready,
    StepDone,
    TokenLogprob,
)

BASE = BaseDescription(
    fingerprint="f" * 64,
    num_layers=2,
    widths={"q_proj": (64, 64), "v_proj": (64, 32)},
    slice_bytes=4096,
    max_rank=256,
)
INFO = Ready(
    engine_epoch=1,
    base=BASE,
    vocab_size=320,
    max_model_len=128,
    page_tokens=16,
    num_frames=100,
    frame_bytes=8192,
    max_num_seqs=8,
    device="cpu",
    dtype="float32",
)
LONG = replace(INFO, max_model_len=1_000_000)
"""For answers that no buffer takes whole."""

Script = Callable[[GenerationSpec], AsyncIterator["list[int] | Exception"]]
"""What the engine makes of a choice: pieces of output, or how it fails. After the last piece the
choice goes on with the letter ``x`` up to its max_tokens."""


def row(name: str, generation: int = 1, status: str = "ready", **fields: Any) -> AdapterRow:
    """A registry row; its digest follows from name and generation."""
    digest = hashlib.sha256(f"{name}@{generation}".encode()).hexdigest()
    values: dict[str, Any] = {
        "id": hash((name, generation)),
        "tenant": "",
        "name": name,
        "generation": generation,
        "digest": digest,
        "config_digest": "c" * 64,
        "weights_digest": "d" * 64,
        "fingerprint": BASE.fingerprint,
        "status": status,
        "error": None,
        "report": {"rank": 8, "num_bytes": 1000, "num_frames": 3},
        "pinned": False,
        "created": 1_700_000_000.0,
    }
    return AdapterRow(**(values | fields))


class FakeWriter:
    """Hashes, keeps nothing."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size, self.hash, self.state = limit, 0, hashlib.sha256(), "open"

    async def write(self, data: bytes) -> None:
        self.size += len(data)
        if self.size > self.limit:
            raise PayloadTooLarge(f"weights: exceeds {self.limit} bytes", param="weights")
        self.hash.update(data)

    async def commit(self) -> str:
        self.state = "committed"
        return self.hash.hexdigest()

    async def abort(self) -> None:
        if self.state == "open":
            self.state = "aborted"


class FakeAdapters:
    """The real catalog over made-up rows; uploads are judged by the first letter of their config:
    ``b``ad ones are refused, ``s``low ones stay in validation."""

    def __init__(self, config: ServerConfig, observations: Observations) -> None:
        self.config = config
        self.catalog = Catalog("base", observations.snapshot)
        self.writers: list[FakeWriter] = []
        self.aliases = AliasService(SimpleNamespace(catalog=self.catalog))  # type: ignore[arg-type]
        for name in ("resolve", "list", "show", "versions", "owner", "own", "labels", "rows"):
            setattr(self, name, getattr(self.catalog, name))
        error = {"code": "rank_mismatch", "message": "2 problems", "problems": ["one", "two"]}
        self.put(row("shout", 3), row("shout", 2))
        self.put(row("whisper"))
        self.put(row("lonely", report={"vectors": ["input_gain"]}))
        self.put(row("slow", status="validating"))
        self.put(row("broken", status="failed", error=error))
        self.put(row("alien", status="incompatible"))

    def put(self, *rows: AdapterRow) -> None:
        self.catalog.put(rows[0].name, list(rows), tenant=rows[0].tenant)

    async def begin(self, param: str = "weights") -> FakeWriter:
        self.writers.append(FakeWriter(self.config.max_adapter_file_bytes))
        return self.writers[-1]

    async def create(
        self,
        name: str,
        config: bytes,
        weights_digest: str,
        *,
        profile: bytes = b"",
        heads_digest: str = "",
        validate_only: bool = False,
        wait_s: float = 0,
        expected_generation: int | None = None,
        ttl_s: int | None = None,
        tenant: str = "",
        blend: None = None,
        base: Role = "target",
    ) -> AdapterView:
        if name == "base":
            raise Conflict("the name is the base model's", param="name", code="name_reserved")
        if config.startswith(b"b"):
            raise AdapterInvalid("2 problems", problems=["one", "two"])
        waits = config.startswith(b"s") or not (wait_s or validate_only)
        made = row(
            name,
            1 if expected_generation is None else expected_generation + 1,
            "validating" if waits else "ready",
            digest=hashlib.sha256(config + weights_digest.encode() + profile).hexdigest(),
            tenant=tenant,
            expires=None if ttl_s is None else int(time.time()) + ttl_s,
            base=base,
        )
        if not validate_only:
            self.put(made)
        return self.catalog.view(made)

    async def delete(self, name: str, *, tenant: str = "") -> AdapterView:
        if self.own(name, tenant=tenant) is None:
            raise NotFound("no such adapter", param="model")
        gone = row(name, status="deleting", tenant=tenant)
        self.put(gone)
        return self.catalog.view(gone)

    async def set_pinned(self, name: str, pinned: bool, *, tenant: str = "") -> AdapterView:
        if (view := self.own(name, tenant=tenant)) is None:
            raise NotFound("no such adapter", param="model")
        if view.status != "ready":
            raise Conflict("not ready", code="adapter_not_ready", retry_after_s=1)
        self.put(row(name, pinned=pinned, tenant=tenant))
        return self.show(name, tenant=tenant)


class FakeFront:
    """See the module. ``aborted`` lists choices cancelled before their end, ``specs`` all;
    ``told`` may add to an output what it likes; ``says`` is what the engine answers to commands."""

    def __init__(self, config: ServerConfig, model: Path) -> None:
        self.config = config
        self.base_name = "base"
        self.created = 1_700_000_000
        self.tokenizer = TokenizerService(model)
        self.observations = Observations()
        self.adapters = FakeAdapters(config, self.observations)
        self.voices = Voices(self.tokenizer, config.data_dir.joinpath)
        self.keys = Keys.of(config)
        self.quotas = Quotas(self.keys.limits, self.observations.rejected)
        self.room = Room(1000, self.observations.rejected)
        self.room.max_tokens = 10**9
        self.ledger = Ledger(self.observations, lambda _: None, lambda _: None, self._ended)
        self.info: Ready | None = INFO
        self.reasons: list[str] = []
        self.sings = True
        self.script: Script = speak("hello wörld 😀, the dog")
        self.specs: list[GenerationSpec] = []
        self.aborted: list[str] = []
        self.cached_tokens = 0
        self.told: Callable[[Output], None] = lambda _: None
        self.state = "new"
        self.commands: list[str] = []
        self.says: dict[str, Any] | Exception = {}
        self.tasks: set[asyncio.Task[None]] = set()

    @property
    def snapshot(self) -> Any:
        return self.observations.snapshot

    @property
    def observer(self) -> Any:
        return self.observations.observer

    @observer.setter
    def observer(self, observer: Any) -> None:
        self.observations.observer = observer

    async def start(self) -> None:
        self.state = "started"

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        self.voices.close()
        self.tokenizer.close()
        self.state = "stopped"

    def not_ready(self) -> list[str]:
        return self.reasons

    @property
    def reserved(self) -> int:
        return self.room.choices - len(self.ledger)

    @property
    def draining(self) -> bool:
        return "draining" in self.reasons

    def admit(self, claim: Claim) -> Admission:
        if self.reasons:
            raise self.room.refuse("no room now", code=self.reasons[0])
        return Admission(self.room, self.quotas, claim)

    def _ended(self, spec: GenerationSpec, num_outputs: int) -> None:
        self.quotas.end(spec, num_outputs)
        self.room.end(spec)

    def submit(self, spec: GenerationSpec) -> Generation:
        if spec.adapters and not any(
            row.digest == spec.adapters[0].digest for row in self.adapters.catalog.rows()
        ):
            raise NotFound("the model has gone", param="model")
        generation = Generation(spec, self._cancel)
        text = self.tokenizer.stream(
            stop=spec.stop,
            include_stop=spec.include_stop,
            skip_special_tokens=spec.skip_special_tokens,
        )
        self.ledger.add(spec, generation, text)
        self.quotas.start(spec)
        self.room.start(spec)
        self.observations.submitted(spec)
        self.specs.append(spec)
        task = asyncio.get_running_loop().create_task(self._run(spec))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return generation

    async def canary(self) -> bool:
        return self.sings

    async def command(self, kind: str, digest: str | None = None) -> dict[str, Any]:
        self.commands.append(kind)
        if isinstance(self.says, Exception):
            raise self.says
        return {"kind": kind, **self.says}

    def _cancel(self, request_id: str) -> None:
        if self.ledger.cancel(request_id):
            self.aborted.append(request_id)

    async def _run(self, spec: GenerationSpec) -> None:
        sampling, index = spec.sampling, 0
        x = self.tokenizer._encode("x", False)
        async for piece in self._pieces(spec, x):
            if isinstance(piece, Exception):
                self._fail(spec, piece)
                return
            piece = piece[: sampling.max_tokens - index]
            stop = next((i for i, t in enumerate(piece) if t in sampling.stop_token_ids), None)
            if stop is not None:
                piece = piece[: stop + 1]
            output = self._output(spec, index, piece)
            index += len(piece)
            finished = []
            if stop is not None or index == sampling.max_tokens:
                token = None if stop is None else piece[-1]
                reason = "length" if stop is None else "stop"
                finished = [
                    Finished(spec.request_id, reason, token, self.cached_tokens, 0.01, 0.02)
                ]
            self.ledger.apply(StepDone(engine_epoch=1, step=0, outputs=[output], finished=finished))
            if spec.request_id not in self.ledger:
                return
            await asyncio.sleep(0)

    async def _pieces(
        self, spec: GenerationSpec, x: list[int]
    ) -> AsyncIterator[list[int] | Exception]:
        async for piece in self.script(spec):
            yield piece
        while True:
            yield x

    def _fail(self, spec: GenerationSpec, error: Exception) -> None:
        assert isinstance(error, LoramuxError), "an engine ends with no others"
        failed = [Failed(spec.request_id, error.code, str(error))]
        self.ledger.apply(StepDone(engine_epoch=1, step=0, failed=failed))

    def _output(self, spec: GenerationSpec, index: int, ids: list[int]) -> Output:
        sampling = spec.sampling
        output = Output(spec.request_id, index, list(ids))
        if sampling.logprobs is not None:
            output.logprobs = [logprob(token_id, sampling.logprobs) for token_id in ids]
        if index == 0:
            output.started = (self.cached_tokens, 0.01, 0.02)
            if sampling.prompt_logprobs is not None:
                output.prompt_logprobs = [
                    logprob(token_id, sampling.prompt_logprobs) if at else None
                    for at, token_id in enumerate(spec.prompt_ids)
                ]
        self.told(output)
        return output


def logprob(token_id: int, top: int) -> TokenLogprob:
    """The chosen token is second; ids 2, 3, ... are its rivals, the last one impossible."""
    rivals = [(2 + i, -0.25 * (i + 1)) for i in range(top - 1)] + [(90, float("-inf"))]
    return TokenLogprob(token_id, -0.375, 2, rivals[:top])


def speak(text: str, *, delay_s: float = 0.0, special: bool = False) -> Script:
    """Says a text, a token a step."""

    async def script(spec: GenerationSpec) -> AsyncIterator[list[int] | Exception]:
        for token_id in tokens(text):
            await asyncio.sleep(delay_s)
            yield [token_id]

    return script


def tokens(text: str) -> list[int]:
    """Ids of a text in the tests' byte-level tokenizer."""
    from tests.front.model_dir import byte_level

    global _tokenizer
    if _tokenizer is None:
        _tokenizer = byte_level()
    ids: list[int] = _tokenizer.encode(text, add_special_tokens=False).ids
    return ids


_tokenizer: Any = None


def fails_after(text: str, error: Exception) -> Script:
    """Says a text and fails."""

    async def script(spec: GenerationSpec) -> AsyncIterator[list[int] | Exception]:
        for token_id in tokens(text):
            yield [token_id]
        yield error

    return script


def eventually(condition: Callable[[], bool], within_s: float = 5.0) -> bool:
    """Whether ``condition`` comes true; for what another thread does."""
    end = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
