"""Running the server: uvicorn around the application, and what is said while it starts."""

from __future__ import annotations

import asyncio
import logging
import socket
import time

import uvloop

from loramux import __version__
from loramux.config import ServerConfig
from loramux.errors import ConfigError
from loramux.front.front import Front
from loramux.front.keys import Keys
from loramux.http import access_log
from loramux.http.app import build_admin_app, build_app
from loramux.http.auth import check_host
from loramux.http.connection import uvicorn_config
from loramux.http.drain import Drain, Server

log = logging.getLogger("loramux")

EXIT_CANNOT_START = 2
"""The configuration is at fault: starting again as it is would not help."""


def serve(config: ServerConfig) -> int:
    """Serve until told to stop; the exit code."""
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)-7s %(message)s")
    access_log.to_stderr(config.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config))


PATIENCE_S = 8.0
"""After this long a person wants to hear that something is happening."""


async def _serve(config: ServerConfig) -> int:
    drain = Drain()
    keys = Keys.of(config)
    check_host(keys, config.host)
    if not keys.guarded:
        log.info("no API key: open to everybody on this machine, and to nobody else")
    front = Front(config)
    sockets: list[socket.socket] = []
    try:
        sockets.append(_listen(config.host, config.port, "port"))
        if config.admin_port is not None:
            sockets.append(_listen(config.host, config.admin_port, "admin_port"))
    except ConfigError:
        for each in sockets:
            each.close()
        await front.stop()
        raise
    servers = [Server(uvicorn_config(build_app(front, config), config, port=config.port))]
    if config.admin_port is not None:
        admin = build_admin_app(front, config)
        servers.append(Server(uvicorn_config(admin, config, port=config.admin_port)))
    beside = [
        asyncio.create_task(_announce(front, servers)),
        asyncio.create_task(drain.run(front, servers)),
        asyncio.create_task(drain.mind(front)),
    ]
    await asyncio.gather(
        *(server.serve([each]) for server, each in zip(servers, sockets, strict=True))
    )
    for task in beside:
        task.cancel()
    if not all(server.started for server in servers) or front.never_started:
        return EXIT_CANNOT_START
    return drain.exit_code


def _listen(host: str, port: int, param: str) -> socket.socket:
    """Before anything is started: a port that is taken is told at once, and nothing is undone."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        flag = f"--{param.replace('_', '-')}"
        raise ConfigError(
            f"{flag} {port} on {host}: {error}. Is another server running? Choose another port.",
            param=param,
        ) from error


async def _announce(front: Front, servers: list[Server]) -> None:
    """Say when the server is ready and how to talk to it; stop it if it never will be."""
    began = time.monotonic()
    config = front.config
    log.info("loramux %s: loading %s", __version__, config.model)
    patience_s = PATIENCE_S
    while front.not_ready():
        if front.draining:
            return
        if time.monotonic() - began > patience_s:
            patience_s = float("inf")
            log.info("still loading; the first start also compiles kernels, about a minute")
        if front.never_started:
            log.error("the engine cannot start; its last message above says why")
            for server in servers:
                server.should_exit = True
            return
        await asyncio.sleep(0.05)
    info = front.info
    assert info is not None
    names = [view.name for view in front.adapters.list() if view.status == "ready"]
    url = f"http://{config.host}:{config.port}"
    log.info(
        "ready in %.1f s: %s (%s, %s), %d frames of %.0f KiB for KV and adapters",
        *(time.monotonic() - began, front.base_name, info.dtype, info.device),
        *(info.num_frames, info.frame_bytes / 1024),
    )
    log.info("adapters: %s", ", ".join(names[:20]) or "none yet")
    if len(names) > 20:
        log.info("          and %d more", len(names) - 20)
    log.info("listening on %s; try:", url)
    key = """-H "authorization: Bearer $LORAMUX_API_KEY" """ if front.keys.guarded else ""
    log.info(
        "curl %s/v1/completions %s-H 'content-type: application/json' "
        """-d '{"model": "%s", "prompt": "Once upon a time", "max_tokens": 32}'""",
        *(url, key, names[0] if names else front.base_name),
    )
