"""The image's health check: 0 when the front answers, whatever its engine does meanwhile.

A container that is replaced loses every stream, and mends nothing that the server does not mend
itself by replacing its engine.
"""

import os
import sys
import urllib.request

port = os.environ.get("LORAMUX_ADMIN_PORT") or os.environ.get("LORAMUX_PORT") or "8000"
try:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/live", timeout=4) as answer:
        sys.exit(answer.status != 200)
except OSError as error:
    sys.exit(f"loramux does not answer on port {port}: {error}")
