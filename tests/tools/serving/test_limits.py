"""What the server refuses, and that nothing is left of any request."""

from __future__ import annotations

import concurrent.futures
import gc
import json
import random
import socket
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from moe_train.config.inference import ServeConfig
from moe_train.config.roots import ServeRoot
from parallel.errors import ConfigError
from tests.tools.serving.server import Loaded, Server, running
from tools import serve

GOOD: dict[str, Any] = {"model": "test", "prompt": "some text", "max_tokens": 5, "temperature": 0}
HUGE = 10**400
JSON = {"Content-Type": "application/json"}


def post(
    server: Server, content: Any, path: str = "/v1/completions", headers: dict[str, str] | None = None
) -> httpx.Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return httpx.post(server.url + path, content=body, timeout=60, headers=JSON | (headers or {}))


def refusal(response: httpx.Response) -> tuple[int, str, str | None]:
    """Status, message and field of an error object, which has all its keys."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return response.status_code, error["message"], error["param"]


@pytest.mark.parametrize(
    ("content", "status", "told", "param"),
    [
        (b"{", 400, "the body is not JSON", None),
        (b"[" * 10_000, 400, "", None),
        (b"\xff\xfe", 400, "", None),
        (b"[]", 400, "the body", None),
        ({}, 400, "prompt: Field required", "prompt"),
        (GOOD | {"prompt": 5}, 400, "prompt", "prompt"),
        (GOOD | {"prompt": []}, 400, "prompt is empty", "prompt"),
        (GOOD | {"prompt": [[]]}, 400, "empty list of tokens", "prompt"),
        (GOOD | {"prompt": [10**9]}, 400, "outside of the vocabulary", None),
        (GOOD | {"prompt": "x y " * 600}, 400, "at most", "prompt"),
        (GOOD | {"max_tokens": 201}, 400, "serve.max_new_tokens=200", "max_tokens"),
        (GOOD | {"max_tokens": HUGE}, 400, "max_tokens", "max_tokens"),
        (GOOD | {"max_tokens": "5"}, 400, "max_tokens", "max_tokens"),
        (GOOD | {"max_tokens": 0}, 400, "needs echo=true", "max_tokens"),
        (GOOD | {"temperature": float("nan")}, 400, "temperature", "temperature"),
        (GOOD | {"temperature": -1}, 400, "temperature", "temperature"),
        (GOOD | {"n": 10**6}, 400, "n", "n"),
        (GOOD | {"prompt": ["a"] * 100, "n": 2}, 400, "200 continuations, at most 128", "n"),
        (GOOD | {"stop": [""]}, 400, "stop", "stop"),
        (GOOD | {"stop": ["a"] * 20}, 400, "stop has more than 16 strings", "stop"),
        (GOOD | {"logit_bias": {"1": 5}}, 400, "logit_bias", "logit_bias"),
        (GOOD | {"best_of": 3}, 400, "best_of", "best_of"),
        (GOOD | {"beam_width": 3}, 400, "beam_width is not a parameter that this server has", "beam_width"),
        (GOOD | {"stream_options": {}}, 400, "only for stream=true", "stream_options"),
        (GOOD | {"model": "gpt"}, 404, "the model 'gpt' does not exist", "model"),
        (GOOD | {"prompt": "\ud800"}, 400, "not valid Unicode text", "prompt"),
        (GOOD | {"prompt": ["a", "b\udfff"]}, 400, "not valid Unicode text", "prompt"),
        (GOOD | {"stop": ["\ud800"]}, 400, "not valid Unicode text", "stop"),
        (GOOD | {"\ud800": 1}, 400, "unicode", None),
        (GOOD | {"temperature": 1e-9}, 400, "temperature=1e-09 is outside its range", None),
        (b" " * 20_001, 413, "larger than serve.max_body_bytes=20000", None),
    ],
)
def test_a_wrong_body_is_an_error_object_that_names_the_field(
    content: Any, status: int, told: str, param: str | None, server: Server
) -> None:
    found, message, field = refusal(post(server, content))
    assert (found, field) == (status, param)
    assert told in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "needs logprobs=true"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, "tools"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages: not valid Unicode text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}, "not valid Unicode text"),
    ],
)
def test_a_wrong_conversation_is_refused(content: Any, told: str, server: Server) -> None:
    status, message, _ = refusal(post(server, content, "/v1/chat/completions"))
    assert status == 400
    assert told in message


def test_paths_and_methods_that_do_not_exist(server: Server) -> None:
    assert refusal(httpx.get(f"{server.url}/v2"))[0] == 404
    assert refusal(httpx.get(f"{server.url}/v1/completions"))[0] == 405
    assert refusal(httpx.get(f"{server.url}/v1/models/other"))[0] == 404


def test_a_body_that_is_not_declared_as_json_is_refused(server: Server) -> None:
    """As it would come from a form of another web site in the user's browser."""
    status, message, _ = refusal(post(server, GOOD, headers={"Content-Type": "text/plain"}))
    assert (status, message) == (415, "send the body with Content-Type: application/json")


def test_a_body_without_a_length_is_limited_too(server: Server) -> None:
    with httpx.Client(timeout=60) as client:
        response = client.post(f"{server.url}/v1/completions", content=(b" " * 1000 for _ in range(1000)))
    assert response.status_code == 413


def test_only_who_has_the_token_is_served(loaded: Loaded) -> None:
    with running(loaded, token="secret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            response = post(server, GOOD, headers=headers)
            assert refusal(response)[0] == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == 401
        assert post(server, GOOD, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_an_address_that_others_can_reach_needs_a_token(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        assert serve.token_of(ServeConfig(host=host)) is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match=r"serve.host=.* and no token is set; set MOE_SERVE_TOKEN or"):
            serve.token_of(ServeConfig(host=host))
    file = tmp_path / "token"
    file.write_text("from-file\n")
    monkeypatch.setenv(serve.TOKEN, "from-environment")
    assert serve.token_of(ServeConfig(host="0.0.0.0")) == "from-environment"
    assert serve.token_of(ServeConfig(host="0.0.0.0", token_file=str(file))) == "from-file"
    file.write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        serve.token_of(ServeConfig(token_file=str(file)))
    with pytest.raises(ConfigError, match=r"serve.token_file=.*/none cannot be read"):
        serve.token_of(ServeConfig(token_file=f"{tmp_path}/none"))


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "fastapi" else name)
    with pytest.raises(ConfigError, match=r"moe-serve needs fastapi, not installed here; .*pip install 'moe-train"):
        serve.run(ServeRoot(), [])


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"serve.port={port} cannot be used: .*; set serve.port"):
            serve.listen(ServeConfig(port=port))


def test_more_requests_than_the_queue_holds_are_told_to_come_again(loaded: Loaded) -> None:
    with running(loaded, max_concurrent=1, max_queued=1) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        with server.without_slots(1):
            queued = pool.submit(post, server, GOOD)
            deadline = time.monotonic() + 60
            while server.service.admission.queued < 1:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            for stream in (False, True):
                refused = post(server, GOOD | {"stream": stream})
                assert refusal(refused)[:2] == (429, "the queue is full (serve.max_queued=1); try again later")
                assert refused.headers["retry-after"] == "1"
        assert queued.result().status_code == 200
        assert post(server, GOOD).status_code == 200
        nothing_is_left(server)


def test_a_request_that_takes_too_long_is_ended(loaded: Loaded) -> None:
    with running(loaded, timeout_s=0.01) as server:
        assert refusal(post(server, GOOD | {"max_tokens": 200}))[:1] == (504,)
        with pytest.raises(httpx.RemoteProtocolError):
            post(server, GOOD | {"max_tokens": 200, "stream": True})
        nothing_is_left(server)


def nothing_is_left(server: Server, tasks: int | None = None) -> None:
    """Waits for the server to be idle: no block in use, no request, and no more tasks than before."""
    admission, deadline = server.service.admission, time.monotonic() + 30
    while True:
        counts = (server.load.used_blocks, server.load.running, server.load.waiting, admission.active, admission.queued)
        found = server.tasks()
        if not any(counts) and (tasks is None or found <= tasks):
            return
        assert time.monotonic() < deadline, (counts, found, tasks)
        time.sleep(0.02)


def cut(server: Server, stream: bool, then: Callable[[], None] = lambda: None) -> None:
    """A request whose client goes away before, or after, the first part of the answer, and after `then`."""
    body = json.dumps(GOOD | {"max_tokens": 200, "stream": stream, "ignore_eos": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        if stream:
            assert connection.recv(64)
        then()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_is_gone_ends_its_request(stream: bool, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = server.service.ranks
    events: list[Any] = []
    submit = ranks.submit

    def counting(prompt: Any, params: Any, stop: Any, deliver: Any) -> int:
        return submit(prompt, params, stop, lambda event: (events.append(event), deliver(event)))

    nothing_is_left(server)
    monkeypatch.setattr(ranks, "submit", counting)

    def wait_for_an_event() -> None:
        deadline = time.monotonic() + 60
        while not events:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    cut(server, stream, wait_for_an_event)
    nothing_is_left(server)
    assert 0 < len(events) < 200  # of the tokens that it asked for


def cut_body(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")


def read_slowly(server: Server) -> str:
    text = ""
    content = GOOD | {"max_tokens": 12, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=content, timeout=60) as response:
        for line in response.iter_lines():
            time.sleep(0.002)
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return text


def mixed_load(server: Server, count: int, at_a_time: int) -> None:
    """Good requests get the right answer whatever others do, and bad ones an error of the client's."""
    wanted = {n: post(server, GOOD | {"max_tokens": n}).json()["choices"][0]["text"] for n in (5, 12)}
    nothing_is_left(server)
    before = server.tasks()
    draw = random.Random(count)
    kinds = ["good", "good", "slow", "cut", "cut stream", "cut body", "malformed", "huge", "absurd", "long"]

    def one(kind: str) -> None:
        if kind == "good":
            assert post(server, GOOD).json()["choices"][0]["text"] == wanted[5]
        elif kind == "slow":
            assert read_slowly(server) == wanted[12]
        elif kind.startswith("cut"):
            cut_body(server) if kind == "cut body" else cut(server, kind == "cut stream")
        else:
            bad: dict[str, Any] = {
                "malformed": b'{"prompt": "a", ', "huge": b"x" * 50_000, "absurd": GOOD | {"max_tokens": HUGE, "n": -1},
                "long": GOOD | {"prompt": "x y " * 900},
            }  # fmt: skip
            assert refusal(post(server, bad[kind]))[0] in (400, 413)

    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        for done in [pool.submit(one, draw.choice(kinds)) for _ in range(count)]:
            done.result()
    nothing_is_left(server, before)
    assert post(server, GOOD).json()["choices"][0]["text"] == wanted[5]


def test_good_requests_among_bad_ones_and_nothing_is_left_of_any(server: Server) -> None:
    mixed_load(server, 40, 12)


@pytest.mark.slow
def test_a_thousand_requests_fifty_at_a_time(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """They leave no memory behind: less than a kibibyte each of Python objects in the server, and few pages in the
    ranks."""
    # oneDNN keeps a kernel of each size that it meets, up to a thousand, which hides what else would grow.
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "1")
    others = set(psutil.Process().children(recursive=True))
    with (
        loaded.model.ranks(loaded.config) as ranks,
        running(Loaded(loaded.model, loaded.config, ranks, ranks.wait()), max_body_bytes=20_000, max_new_tokens=200,
                max_queued=1000) as server,
    ):  # fmt: skip
        mixed_load(server, 200, 50)  # fills caches
        tracemalloc.start()
        try:
            processes = [p for p in psutil.Process().children(recursive=True) if p not in others]
            own, of_ranks = memory(processes)
            mixed_load(server, 1000, 50)
            own_after, of_ranks_after = memory(processes)
        finally:
            tracemalloc.stop()
    assert own_after - own < 1 << 20
    assert of_ranks > 50 << 20
    assert of_ranks_after - of_ranks < 8 << 20


def memory(processes: list[psutil.Process]) -> tuple[int, int]:
    """Bytes of the Python objects of this process, and those that only `processes` use."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0], sum(process.memory_full_info().uss for process in processes)
