"""A large file on its way in never is in memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path


def test_memory_stays_flat(tmp_path: Path) -> None:
    """100 MB as a blob, with and without a length, and 100 MB as a part, to a server of its own
    process; its peak must not show them. Takes a few seconds: the bytes really go to the disk."""
    script = textwrap.dedent(
        f"""
        import resource
        from pathlib import Path
        from tests.http import wire
        from tests.http.test_blobs import real_server, sha

        MB = 100
        block = b"m" * (1 << 20)
        with real_server(Path({str(tmp_path)!r})) as server:
            server.http.put("/v1/blobs/sha256:" + sha(block), content=block)
            made = server.post("/v1/uploads", bytes=MB << 20, sha256="a" * 64).json()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for head, status in (
                ("PUT /v1/blobs/sha256:" + "b" * 64, 400),
                ("PUT /v1/blobs/sha256:" + "c" * 64, 400),
                ("PATCH /v1/uploads/" + made["id"], 204),
            ):
                raw = wire.connect(server)
                raw.settimeout(60)
                chunked = "cccc" in head
                length = f"content-length: {{MB << 20}}"
                if chunked:
                    length = "transfer-encoding: chunked"
                lines = [head + " HTTP/1.1", "host: localhost", "upload-offset: 0", length, "", ""]
                raw.sendall("\\r\\n".join(lines).encode())
                for _ in range(MB):
                    raw.sendall(b"100000\\r\\n" + block + b"\\r\\n" if chunked else block)
                raw.sendall(b"0\\r\\n\\r\\n" if chunked else b"")
                assert wire.status(wire.read_until(raw, b"\\r\\n\\r\\n")) == status, head
            answer = server.http.post("/v1/uploads/" + made["id"] + "/complete", timeout=60)
            assert answer.status_code == 400  # hashed as a whole, and not what was announced
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            wire.close_all()
        assert grown < 30 << 10, f"{{grown}} KiB"
        """
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
