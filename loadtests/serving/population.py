"""The model and the adapters that a load test serves, made once in a folder and kept.

Two models, both random: ``135M`` (``cases.SHAPE``) and ``tiny`` (the tests' own; a server of it
starts in seconds and says nothing about speed). Adapter ``k`` has rank ``ranks[k % len(ranks)]`` on
q, k, v, o (as S-LoRA's) or on all seven modules, in bf16. A few of each rank have weights of their
own, the others are hard links to those under another ``lora_alpha``: each is an adapter of its
own to the server, validated, packed, loaded and evicted by itself, and the disk holds the PEFT
files of a few.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server"), str(ROOT / "kernels")]

from cases import TARGETS, write_checkpoint  # noqa: E402
from tests.e2e.server import Server  # noqa: E402

DIFFERENT = 4
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Model = Literal["135M", "tiny"]


@dataclass(frozen=True)
class Population:
    """Which model, and which adapters. Raises ValueError for a model or targets that are not."""

    folder: Path
    model: Model = "135M"
    ranks: tuple[int, ...] = (8,)
    targets: Literal["attention", "all"] = "attention"

    def __post_init__(self) -> None:
        if self.model not in ("135M", "tiny"):
            raise ValueError(f"model: no {self.model!r}; there are 135M and tiny")
        if self.targets not in ("attention", "all"):
            raise ValueError("targets: attention or all")

    @property
    def home(self) -> Path:
        """Where this population lives."""
        ranks = "-".join(map(str, self.ranks))
        return self.folder / f"{self.model}-{self.targets}-r{ranks}"

    @property
    def base(self) -> Path:
        return self.folder / self.model / "base"

    @property
    def data_dir(self) -> Path:
        """The server's: its registry and packed adapters stay there for the next run."""
        return self.home / "data"

    @property
    def vocabulary(self) -> int:
        size: int = json.loads((self.base / "config.json").read_text())["vocab_size"]
        return size

    def write_base(self) -> None:
        """Make the model, unless it is there."""
        if (self.base / "tokenizer_config.json").exists():
            return
        if self.model == "135M":
            write_checkpoint(self.base.parent)
        else:
            from tests.tiny import write_model

            write_model(self.base)

    def adapter(self, index: int) -> Path:
        """The PEFT folder of adapter ``index``."""
        return self.home / "adapters" / f"a{index}"

    def write_adapters(self, count: int, say: Callable[[str], None] = lambda text: None) -> None:
        """Make the first ``count`` adapters, unless they are there."""
        for index in range(count):
            folder = self.adapter(index)
            if (folder / CONFIG).exists():
                continue
            folder.mkdir(parents=True, exist_ok=True)
            first = index % (DIFFERENT * len(self.ranks))
            if first == index:
                self._write_weights(folder / WEIGHTS, self.ranks[index % len(self.ranks)], index)
            else:
                (folder / WEIGHTS).unlink(missing_ok=True)
                os.link(self.adapter(first) / WEIGHTS, folder / WEIGHTS)
            (folder / CONFIG).write_text(json.dumps(self._config(index)))
            if index % 100 == 99:
                say(f"{index + 1} adapters written")

    def _targets(self) -> list[str]:
        return TARGETS[:4] if self.targets == "attention" else TARGETS

    def _config(self, index: int) -> dict[str, Any]:
        rank = self.ranks[index % len(self.ranks)]
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": rank * (1 + index * 1e-6),
            "target_modules": self._targets(),
        }

    def _write_weights(self, path: Path, rank: int, seed: int) -> None:
        import torch
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, (width_in, width_out) in self._widths().items():
            a = 0.02 * torch.randn(rank, width_in, generator=generator)
            b = 0.4 / rank**0.5 * torch.randn(width_out, rank, generator=generator)
            prefix = f"base_model.model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = b.bfloat16()
        save_file(tensors, path, metadata={"format": "pt"})

    def _widths(self) -> dict[str, tuple[int, int]]:
        """(in, out) of every module that an adapter is on."""
        config = json.loads((self.base / "config.json").read_text())
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        head = config.get("head_dim") or hidden // config["num_attention_heads"]
        q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        widths = {"q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv)}
        widths |= {"o_proj": (q, hidden), "gate_proj": (hidden, inner), "up_proj": (hidden, inner)}
        widths |= {"down_proj": (inner, hidden)}
        return {
            f"layers.{layer}.{'self_attn' if t in TARGETS[:4] else 'mlp'}.{t}": widths[t]
            for layer in range(config["num_hidden_layers"])
            for t in self._targets()
        }

    def serve(self, count: int, flags: Sequence[str] = ()) -> Server:
        """A server that knows at least the first ``count`` adapters; ready when this returns, which
        takes minutes the first time that it is a thousand."""
        self.write_base()
        self.write_adapters(count)
        self.home.mkdir(parents=True, exist_ok=True)
        fresh = len(self.digests()) < count
        if fresh:
            flags = [*flags, "--adapters", str(self.home / "adapters")]
        server = Server(self.base, self.data_dir, "--served-model-name", "base", *flags)
        if fresh:
            rows = server.http.get("/v1/adapters").json()["data"]
            ready = {row["name"]: row["digest"] for row in rows if row["status"] == "ready"}
            if len(ready) < count:
                server.close(signal.SIGKILL)
                told = f"{len(ready)} of {count} adapters are ready; see {server.log.name}"
                raise RuntimeError(told)
            self._registered.write_text(json.dumps(ready))
        return server

    @property
    def _registered(self) -> Path:
        return self.home / "registered.json"

    def digests(self) -> list[str]:
        """Of the adapters that a server here knows, in order; their packed files are in
        ``data_dir``."""
        if not self._registered.exists():
            return []
        known: dict[str, str] = json.loads(self._registered.read_text())
        return [known[f"a{index}"] for index in range(len(known))]

    def keys(self, tenants: int) -> tuple[Path, list[str]]:
        """A keys file, and the key of each tenant; the last one may read metrics too."""
        path = self.home / f"keys-{tenants}.json"
        path.unlink(missing_ok=True)
        found = []
        for index in range(tenants + 1):
            tenant, scopes = (f"t{index}", "infer") if index < tenants else ("operator", "admin")
            command = [
                sys.executable,
                "-m",
                "loramux.cli",
                "keys",
                "create",
                "--api-keys",
                str(path),
            ]
            made = subprocess.run(
                [*command, "--tenant", tenant, "--scopes", scopes],
                env={**os.environ, "PYTHONPATH": f"{ROOT / 'server'}:{ROOT / 'kernels'}"},
                capture_output=True,
                text=True,
                check=True,
            )
            found += re.findall(r"lmx_[\w-]+", made.stdout)
        if len(found) != tenants + 1:
            raise RuntimeError(f"{len(found)} keys for {tenants} tenants and an operator")
        return path, found
