"""`moe-serve`: serve a trained model over HTTP, with OpenAI's completion interface.

    moe-serve runs/NAME
    moe-serve hf-directory serve.port=9000 parallel.tp=2 engine.cache_format=fp8
    MOE_SERVE_TOKEN=secret moe-serve runs/NAME serve.host=0.0.0.0

The model is a run (its newest checkpoint), a Megatron checkpoint or a Hugging Face directory. Clients use
http://127.0.0.1:8000/v1 as their base URL: /v1/completions, /v1/chat/completions, /v1/models; /health and /metrics are
for monitoring. Any address but a loopback one needs a token. SIGTERM and Ctrl-C end the server after running requests
have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from moe_train.config.inference import ServeConfig
from moe_train.config.roots import ServeRoot
from moe_train.files import untrusted
from moe_train.inference import chat_template
from parallel.errors import ConfigError
from tools import trained_model

_COMMON = (
    *trained_model.COMMON, "serve.host", "serve.port", "serve.token_file", "serve.max_concurrent", "serve.max_queued",
    "serve.max_new_tokens", "serve.timeout_s",
)  # fmt: skip
TOKEN = "MOE_SERVE_TOKEN"
_WATCH_S = 0.2


def main() -> NoReturn:
    """Console script."""
    trained_model.main(
        run,
        ServeRoot,
        about=__doc__,
        common=_COMMON,
    )


def run(cfg: ServeRoot, words: Sequence[str]) -> None:
    """Serve until a signal asks to end.

    Args:
        words: overrides of the command line.

    Raises:
        MoeTrainError: with a cause and a remedy.
    """
    _check_packages()
    token = token_of(cfg.serve)
    model = trained_model.find(cfg, words, "moe-serve")
    template = chat_template.load(model.tokenizer)
    with contextlib.closing(listen(cfg.serve)) as listener, model.ranks(cfg.engine) as ranks:
        from tools.serving.app import Service, build
        from tools.serving.limits import Gate
        from tools.serving.metrics import Metrics
        from tools.serving.requests import Admission

        print(f"loading {model.name} ...", flush=True)
        facts = ranks.wait()
        service = Service(
            cfg.serve.model_name or model.name, ranks, facts, model.tokenizer, model.encode, model.stop_token_ids,
            template, cfg.serve, Admission(cfg.serve.max_concurrent, cfg.serve.max_queued),
            Metrics(lambda: ranks.load, facts.num_blocks),
        )  # fmt: skip
        gate = Gate(build(service), token, cfg.serve.max_body_bytes, service.metrics.count)
        host, port = listener.getsockname()[:2]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"http://{address}/v1 serves {service.name}: {facts.layout}, KV cache of {facts.num_blocks:,} blocks of "
              f"{facts.block_size} tokens", flush=True)  # fmt: skip
        if not template.exists:
            print("the tokenizer has no chat template: /v1/chat/completions continues the text", flush=True)
        with _noted_signals():
            asyncio.run(serve(gate, listener, service.admission, ranks, cfg.serve.drain_s))
        if not ranks.is_alive:
            raise ranks.error


def _check_packages() -> None:
    """Raise ConfigError where a package of the server is not installed."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"moe-serve needs {', '.join(missing)}, not installed here",
            f"{sys.executable} -m pip install 'moe-train[serve]', or in a clone '.[serve]'",
        )


async def serve(app: Any, listener: socket.socket, admission: Any, ranks: Any, drain_s: float) -> None:
    """Answer requests until a signal comes or the ranks have ended; then let running requests end."""
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=int(drain_s),
        server_header=False,
    )  # fmt: skip
    server = uvicorn.Server(config)

    async def watch() -> None:
        while not server.should_exit:
            server.should_exit |= not ranks.is_alive
            await asyncio.sleep(_WATCH_S)
        admission.draining = True

    watching = asyncio.ensure_future(watch())
    try:
        await server.serve(sockets=[listener])
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


def token_of(serve: ServeConfig) -> str | None:
    """The token that requests must have.

    Raises:
        ConfigError: there is none, and the address is not a loopback address.
    """
    token = os.environ.get(TOKEN) or None
    if serve.token_file is not None:
        try:
            token = untrusted.read_bytes(Path(serve.token_file), 1 << 16).decode().strip()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"serve.token_file={serve.token_file} cannot be read: {error}", "name a file with the token"
            ) from error
        if not token:
            raise ConfigError(f"serve.token_file={serve.token_file} is empty", "write the token into it")
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError("the token has characters that a header cannot have", "use ASCII without spaces")
    if token is None and not _is_loopback(serve.host):
        raise ConfigError(
            f"serve.host={serve.host} can be reached from other machines, and no token is set",
            f"set {TOKEN} or serve.token_file, or serve.host=127.0.0.1",
        )
    return token


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may mean any address
        return False


def listen(serve: ServeConfig) -> socket.socket:
    """The socket of the server.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(serve.host, serve.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((serve.host, serve.port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"serve.host={serve.host} serve.port={serve.port} cannot be used: {error.strerror or error}",
            "set serve.port to one that is free, or serve.port=0",
        ) from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # a client that reads nothing loses its connection
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * serve.timeout_s))
    return listener


@contextlib.contextmanager
def _noted_signals() -> Any:
    """uvicorn handles signals, and raises them again when it has ended: by then they have had their effect."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
