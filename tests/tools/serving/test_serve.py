"""`moe-serve` from its start to its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests import forked
from tests.tools.serving.server import Loaded, running
from tests.tools.serving.test_limits import nothing_is_left


def test_sigterm_lets_a_running_request_end(trained: Path) -> None:
    program = str(Path(sys.executable).parent / "moe-serve")
    words = [program, str(trained / "run"), "serve.port=0", "runtime=cpu", "serve.model_name=mine"]
    environment = dict(os.environ) | {"MOE_SERVE_TOKEN": "secret"}
    process = forked.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    lines = iter(process.stdout.readline, "")
    line = next(line for line in lines if " serves " in line)
    match = re.match(r"(http://127\.0\.0\.1:\d+)/v1 serves mine: one rank, KV cache of [\d,]+ blocks", line)
    assert match, line
    body = {"model": "mine", "prompt": "some text", "max_tokens": 60, "stream": True, "ignore_eos": True}
    with httpx.Client(base_url=match[1], headers={"Authorization": "Bearer secret"}, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            events = response.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            assert list(filter(None, events))[-1] == "data: [DONE]"
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{match[1]}/health")
    assert process.wait(60) == 0, process.stderr.read()
    assert process.stderr.read() == ""


@pytest.mark.slow
def test_schemathesis_finds_no_error_of_the_server(loaded: Loaded) -> None:
    """Requests that its schema allows, and others."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    statuses: dict[str, set[int]] = {}
    some = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    with running(loaded, max_new_tokens=4) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        for result in schema.get_all_operations():
            operation = result.ok()

            def send(case: schemathesis.Case) -> None:
                statuses.setdefault(case.path, set()).add(case.call().status_code)

            some(given(case=operation.as_strategy())(send))()
            if operation.method == "post":
                wrong = operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
                some(given(case=wrong)(send))()
        nothing_is_left(server)
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics"} <= statuses.keys()
    assert {200, 400} <= statuses["/v1/chat/completions"]
    assert max(max(found) for found in statuses.values()) < 500, statuses
