"""Everything a GPU can show, in under nine minutes, written to docs/results/gpu-<name>.md.

    make gpu-check            or: python loadtests/gpu/check.py --name h100

A part that fails is a part of the page that says so; the rest goes on.
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "server"), str(ROOT / "kernels"), str(Path(__file__).parent)]

import torch  # noqa: E402
from document import Document, table  # noqa: E402

GIB = 2**30


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", help="in the file's name; the device's own name if not given")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs/results", help="folder of the page"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="no part begins after this")
    parser.add_argument("--adapters", type=int, default=64, help="adapters of the served model")
    parser.add_argument(
        "--pool-gib", type=float, default=24, help="memory pool of the served model"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        say("gpu-check: this machine shows no CUDA device")
        return 2
    device = torch.cuda.get_device_properties(0)
    name = args.name or re.sub(r"[^a-z0-9]+", "-", device.name.lower().replace("nvidia", "")).strip(
        "-"
    )
    page = Document(
        args.out / f"gpu-{name}.md",
        f"On a GPU: {device.name}",
        " ".join(["python", "loadtests/gpu/check.py", *sys.argv[1:]]),
        facts(device),
        deadline_s=args.minutes * 60,
        say=say,
    )
    measure(page, args)
    say(f"written: {args.out / f'gpu-{name}.md'}; failed or not run: {len(page.failures)}")
    return 1 if page.failures else 0


def facts(device: torch.cuda._CudaDeviceProperties) -> list[tuple[str, str]]:
    """The machine and the software, as the page's head gives them."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    memory = f"{device.total_memory / GIB:.0f} GiB"
    versions = f"torch {torch.__version__}, triton {metadata.version('triton')}"
    return [
        ("commit", commit or "unknown"),
        (
            "device",
            f"{device.name}, {device.multi_processor_count} multiprocessors, {memory}, "
            f"capability {device.major}.{device.minor}",
        ),
        (
            "software",
            f"Python {platform.python_version()}, {versions}, CUDA {torch.version.cuda}",
        ),
    ]


def measure(page: Document, args: argparse.Namespace) -> None:
    """All parts, the quickest answers first."""
    import kernels
    from timing import Ceilings, ceilings

    found: dict[str, Ceilings] = {}

    def machine() -> str:
        found["ceiling"] = ceilings()
        torch.cuda.empty_cache()
        rows = [
            ["copy (read + written), TB/s", found["ceiling"].bandwidth / 1e12],
            ["bf16 product, TFLOP/s", found["ceiling"].matmul / 1e12],
        ]
        return table(["what", "measured"], rows)

    started: list[Any] = []

    def start() -> str:
        # The server needs more packages than the kernels do: without them, only its parts fail.
        import serving

        started.append(serving.Served(args.adapters, int(args.pool_gib * GIB)))
        return serving.start(started[0])

    def throughput() -> str:
        import serving

        return serving.throughput(started[0], found["ceiling"])

    def syncs() -> str:
        import serving

        return serving.syncs(started[0])

    page.section("The device", machine)
    page.section("Correctness", correctness)
    page.section("Start of an 8B-shaped model", start)
    page.section("Served end to end", throughput)
    page.section("Synchronisations", syncs)
    started.clear()
    torch.cuda.empty_cache()
    page.section("LoRA kernels", lambda: kernels.lora(found["ceiling"], page.left_s))
    page.section("Attention kernel", lambda: kernels.attention(found["ceiling"]))
    page.section("Other servers' kernels", peers)


def correctness() -> str:
    """The tests that need a device, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/kernels", "-q", "--no-header"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise RuntimeError("\n".join([*lines[-8:], *done.stderr.strip().splitlines()[-4:]]))
    return f"`{' '.join(command[1:])}`: {lines[-1]}"


def peers() -> str:
    """Which servers with LoRA kernels are installed here."""
    rows = []
    for package in ("vllm", "sglang"):
        try:
            rows.append([package, metadata.version(package)])
        except metadata.PackageNotFoundError:
            rows.append([package, "not installed"])
    return table(["package", "version"], rows)


if __name__ == "__main__":
    sys.exit(main())
