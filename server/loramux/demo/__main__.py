"""``python -m loramux.demo``: upload an adapter, send one mixed batch, watch the answers side by
side. Talks to a running server, or starts one for as long as it takes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from loramux.adapters_cli import DEFAULT_URL
from loramux.config import DEMO_DIR
from loramux.demo.prompts import SHOWCASE
from loramux_client import AsyncClient, Client, LoramuxClientError

UPLOADED = "uploaded-by-the-demo"
START_TIMEOUT_S = 180.0


@dataclass
class Answer:
    """One adapter's answer as it comes in."""

    adapter: str
    prompt: str
    text: str = ""
    num_tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None

    def panel(self) -> Panel:
        seconds = (self.ended or time.monotonic()) - self.began
        rate = f"{self.num_tokens} tokens, {self.num_tokens / max(seconds, 1e-9):.0f}/s"
        body = Text.assemble((self.prompt, "bold"), self.text)
        return Panel(body, title=self.adapter, title_align="left", subtitle=rate)


@contextlib.contextmanager
def server(url: str | None, console: Console) -> Iterator[str]:
    """The address of a server that is ready: ``url``, the default one, or our own."""
    if _answers(url or DEFAULT_URL):
        yield url or DEFAULT_URL
        return
    if url:
        console.print(f"no server answers at {url}", style="red")
        sys.exit(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as data_dir:
        command = [sys.executable, "-m", "loramux.cli", "serve", "--port", str(port)]
        process = subprocess.Popen([*command, "--data-dir", data_dir, "--log-level", "warning"])
        try:
            with console.status("starting a server of our own"):
                _await_ready(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    with Client(url, max_retries=0) as client:
        try:
            return client.health().ready
        except LoramuxClientError:
            return False


def _await_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with Client(url, max_retries=0) as client:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(LoramuxClientError):
                if client.health().ready:
                    return
            time.sleep(0.2)
    raise SystemExit("the server did not become ready")


async def _ask(client: AsyncClient, answer: Answer, max_tokens: int) -> None:
    answer.began = time.monotonic()
    stream = client.stream(
        answer.prompt, model=answer.adapter, max_tokens=max_tokens, temperature=0.7, seed=1
    )
    async with stream:
        async for chunk in stream:
            answer.text += chunk.text
            answer.num_tokens += bool(chunk.text)
    answer.ended = time.monotonic()


async def _mixed_batch(url: str, answers: list[Answer], max_tokens: int, live: Live) -> None:
    async with AsyncClient(url) as client:
        tasks = [asyncio.create_task(_ask(client, answer, max_tokens)) for answer in answers]
        while not all(task.done() for task in tasks):
            live.update(Group(*(answer.panel() for answer in answers)))
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)
        live.update(Group(*(answer.panel() for answer in answers)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--url", help=f"a running server (default: {DEFAULT_URL}, or our own)")
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()
    console = Console()
    with server(args.url, console) as url:
        with Client(url) as client:
            base = client.models()[0].id
            first = next(adapter for adapter, _ in SHOWCASE if adapter)
            pushed = client.adapters.push(DEMO_DIR / "adapters" / first, name=UPLOADED)
            console.print(
                f"uploaded [bold]{pushed.name}[/bold]: rank {pushed.rank}, "
                f"digest {pushed.digest[:12]}"
            )
        answers = [Answer(adapter or base, prompt) for adapter, prompt in SHOWCASE]
        answers.append(Answer(UPLOADED, next(prompt for adapter, prompt in SHOWCASE if adapter)))
        began = time.monotonic()
        with Live(console=console, refresh_per_second=20) as live:
            asyncio.run(_mixed_batch(url, answers, args.max_tokens, live))
        seconds = time.monotonic() - began
        total = sum(answer.num_tokens for answer in answers)
        console.print(
            f"{len(answers)} requests, {len({a.adapter for a in answers})} models, one batch: "
            f"{total} tokens in {seconds:.2f} s = [bold]{total / seconds:.0f} tokens/s[/bold]"
        )
        with Client(url) as client:
            client.adapters.delete(UPLOADED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
