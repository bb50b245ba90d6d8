"""Every setting of the server, frozen, validated once; the only reader of the environment.

A field is a flag (``--max-num-seqs``) and a variable (``LORAMUX_MAX_NUM_SEQS``); the flag wins.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

DEMO_DIR = Path(__file__).parent / "demo"
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
HEADS_BYTES = 512 << 20
"""An engine keeps adapters' own Medusa heads of so many bytes, whoever used them last."""
"""What an adapter may be called: it ends up in labels, logs and URLs, and is never a path."""


class ServerConfig(BaseSettings):
    """``loramux serve``. Byte sizes are integers; times are seconds."""

    model_config = SettingsConfigDict(
        env_prefix="LORAMUX_",
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    model: Path = Field(DEMO_DIR / "base", description="directory of the base model (HF format)")
    draft_model: Path | None = Field(
        None, description="directory of a small model with the base's tokenizer, to guess ahead"
    )
    small_model: Path | None = Field(
        None,
        description="directory of a smaller model with the base's tokenizer, for entropy-adaptive"
        " decoding",
    )
    served_model_name: str | None = Field(None, description="name of the base in the API")
    adapter: tuple[str, ...] = Field((), description="NAME=DIR: register this PEFT adapter")
    adapters: Path | None = Field(None, description="register every adapter folder found in here")
    host: str = Field(
        "127.0.0.1", description="address to listen on; without API keys only this machine's own"
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on")
    admin_port: int | None = Field(None, description="serve /metrics, /health, /admin here instead")
    public_metrics: bool = Field(
        False, description="/metrics needs no key; it names adapters, of every tenant"
    )
    api_keys: Path | None = Field(
        None, description="file of API keys, as loramux keys writes it (default: in --data-dir)"
    )
    allowed_host: tuple[str, ...] = Field(
        (),
        description="NAME: without API keys, answer requests for this host name too, besides"
        " localhost and 127.0.0.1",
    )
    data_dir: Path = Field(Path("data"), description="registry and adapter files live here")
    device: str = Field("auto", description="auto, cpu or cuda")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on cpu, the checkpoint's own on cuda"
    )
    quantize: Literal["none", "int8"] = Field(
        "none", description="int8: round the base's matrices to 8 bits (cpu only)"
    )
    pool_memory: str = Field("auto", description="bytes (512M, 8G) or a fraction of what is free")
    host_memory: str = Field(
        "auto", description="pinned memory for adapters on their way to a GPU; like --pool-memory"
    )
    page_tokens: int = Field(16, ge=1, le=256, description="tokens in one page of KV cache")
    max_model_len: int | None = Field(None, ge=1, description="longest prompt plus output (tokens)")
    max_num_seqs: int = Field(64, ge=1, description="most requests in one batch")
    max_batch_tokens: int = Field(512, ge=16, description="most tokens in one step")
    max_rank: int = Field(256, ge=1, description="adapters of a larger rank are refused")
    max_adapter_bytes: int | None = Field(
        None,
        ge=1,
        description="refuse adapters that take more of the pool (default: for those with whole"
        " embeddings a quarter of it)",
    )
    threads: int = Field(0, ge=0, description="compute threads; 0: one per core")
    prefix_caching: bool = Field(True, description="reuse KV of equal prompt beginnings")
    speculation: Literal["auto", "off"] = Field(
        "auto", description="auto: requests that do not say guess ahead with every drafter there is"
    )
    strict_fields: bool = Field(False, description="refuse unknown request fields")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    access_log: Literal["json", "off"] = Field(
        "json", description="json: a line a request on stderr, without anything a client wrote"
    )

    otel: bool = Field(
        False, description="send OpenTelemetry traces as OTEL_* variables say; needs loramux[otel]"
    )
    max_waiting: int = Field(1024, ge=1, description="requests that may wait; more get a 503")
    max_connections: int | None = Field(
        None, ge=1, description="open connections (default: half of the open files it may have)"
    )
    max_waiting_tokens: int | None = Field(
        None,
        ge=0,
        description="tokens of requests that may wait, prompts and answers; more get a 503"
        " (default: eight times what the pool holds)",
    )
    max_body_bytes: int = Field(8 << 20, description="largest JSON body")
    max_adapter_file_bytes: int = Field(2 << 30, description="largest adapter weights file")
    max_config_bytes: int = Field(64 << 10, description="largest adapter_config.json")
    blob_ttl_s: float = Field(86400, gt=0, description="how long a blob waits for an adapter")
    upload_ttl_s: float = Field(86400, gt=0, description="time to complete a resumable upload")
    sweep_s: float = Field(3600, gt=0, description="how often expired blobs and uploads go")
    lora_path_root: Path | None = Field(
        None, description="/v1/load_lora_adapter may load folders in here"
    )
    first_token_slo_s: float | None = Field(
        None,
        gt=0,
        description="refuse with 503, while they wait, requests whose first token would come later",
    )
    fairness_debt_tokens: int = Field(
        256,
        description="tokens an adapter may be served beyond the least served waiting one, and "
        "beyond what giving it a seat costs",
    )
    heartbeat_s: float = Field(1.0, gt=0, description="how often the engine says it is alive")
    heartbeat_timeout_s: float = Field(5.0, gt=0, description="silence that counts as death")
    step_timeout_s: float = Field(30.0, gt=0, description="a step longer than this is a hang")
    write_timeout_s: float = Field(
        30.0, gt=0, description="each 64 KiB of an answer have so long to be read, or it is cut off"
    )
    header_timeout_s: float = Field(10.0, gt=0, description="time for a request's headers to come")
    body_timeout_s: float = Field(
        30.0, gt=0, description="time for each 64 KiB of a request's body"
    )
    keep_alive_s: float = Field(15.0, gt=0, description="a silent stream gets a comment this often")
    drain_s: float = Field(30.0, ge=0, description="time for running requests after SIGTERM")

    @property
    def max_heads_bytes(self) -> int:
        """Of an adapter's own Medusa heads. An engine keeps HEADS_BYTES of such files."""
        return min(self.max_adapter_file_bytes, HEADS_BYTES)

    @property
    def keys_file(self) -> Path:
        """Where the API keys are, or would be."""
        return self.api_keys or self.data_dir / "keys.json"

    @field_validator("adapter")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            name, sep, _ = item.partition("=")
            if not sep or not ADAPTER_NAME.fullmatch(name):
                raise ValueError(f"{item!r} is not NAME=DIR with NAME like {ADAPTER_NAME.pattern}")
        return value

    @field_validator("allowed_host")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            if not re.fullmatch(r"[A-Za-z0-9._-]+", item):
                raise ValueError(f"{item!r} is no host name (no scheme, no port)")
        return value

    @model_validator(mode="after")
    def _pool(self) -> ServerConfig:
        parse_memory(self.pool_memory)
        parse_memory(self.host_memory)
        return self


def client_key() -> str | None:
    """The API key with which commands ask a running server."""
    return os.environ.get("LORAMUX_API_KEY")


def otlp_protocol() -> str:
    """How OpenTelemetry's variables want traces to travel."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    return next((os.environ[name] for name in names if os.environ.get(name)), "http/protobuf")


def process_environment() -> dict[str, str]:
    """The environment of the processes the front starts: its own, and a short spin for OpenMP.

    The engine shares its cores with the front. A thread of GNU OpenMP that waits at a barrier spins
    for milliseconds by default, and does so on the core its partner needs: measured on two shared
    cores, a decode-sized matmul took 7-40 ms that way, 0.5-5 ms with this count.
    """
    return {"GOMP_SPINCOUNT": "10000", **os.environ}


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_memory(text: str) -> int | float | None:
    """``"auto"`` -> None, ``"0.9"`` -> a fraction, ``"512M"`` or ``"1000000"`` -> bytes."""
    text = text.strip().lower()
    if text == "auto":
        return None
    if match := re.fullmatch(r"(\d+)([kmgt]?)i?b?", text):
        return int(match[1]) * _UNITS[match[2]]
    if (match := re.fullmatch(r"0?\.\d+", text)) and 0 < float(text) < 1:
        return float(text)
    raise ValueError(f"{text!r} is neither bytes (1000000, 512M, 8G) nor a fraction (0.9)")
