"""Limits of requests and names of listeners, without a server; over sockets: tests/e2e."""

import asyncio
import fnmatch
import json
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from serving.hosts import VARIABLE, for_mlflow, trusted_hosts
from serving.limits import Limits, OneByOne

LIMITS = Limits(body=100, reading=0.5, waiting=2, seconds=0.5)


class Slow:
    """An app that answers when it is told to, and remembers what it began."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.may_answer = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun.append((await receive())["body"])
        await self.may_answer.wait()
        await PlainTextResponse("done")(scope, receive, send)


class Caller:
    """A client of one request; `gone` ends its connection."""

    def __init__(self, door: OneByOne, *parts: bytes, whole: bool = True):
        self.parts, self.whole, self.gone, self.sent = list(parts), whole, asyncio.Event(), []
        self.unread = len(parts)  # when the answer began
        scope = {"type": "http", "method": "POST", "path": "/draw", "headers": [], "query_string": b""}
        self.task = asyncio.create_task(door(scope, self.receive, self.send))

    async def receive(self) -> dict[str, Any]:
        if self.parts:
            part = self.parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self.parts) or not self.whole}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.unread = self.unread if self.sent else len(self.parts)
        self.sent.append(message)

    async def status(self) -> int:
        await asyncio.wait_for(self.task, 5)
        return self.sent[0]["status"]


def in_a_loop(work: Coroutine[Any, Any, None]) -> None:
    """In a thread of its own: a browser of other tests may have left a running loop in this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(asyncio.run, work).result()


def run(test: Any) -> None:
    async def with_app() -> None:
        app = Slow()
        await test(app, OneByOne(app, "/draw", lambda headers, body: None, LIMITS))

    in_a_loop(with_app())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_requests_are_answered_one_by_one_in_their_order() -> None:
    async def test(app: Slow, door: OneByOne) -> None:
        callers = [Caller(door, name) for name in (b"a", b"b", b"c")]
        await settle()
        assert app.begun == [b"a"]
        app.may_answer.set()
        assert [await caller.status() for caller in callers] == [200, 200, 200]
        assert app.begun == [b"a", b"b", b"c"]

    run(test)


def test_what_finds_the_queue_full_is_told_to_come_back_and_leaves_a_place_to_others() -> None:
    async def test(app: Slow, door: OneByOne) -> None:
        callers = [Caller(door, b"x") for _ in range(4)]
        assert await callers[3].status() == 503
        assert (b"retry-after", b"5") in callers[3].sent[0]["headers"]
        app.may_answer.set()
        assert [await caller.status() for caller in callers[:3]] == [200] * 3
        assert await Caller(door, b"y").status() == 200

    run(test)


def test_a_request_whose_client_has_gone_is_not_begun_and_makes_room() -> None:
    async def test(app: Slow, door: OneByOne) -> None:
        first, leaves, stays = (Caller(door, name) for name in (b"a", b"b", b"c"))
        await settle()
        leaves.gone.set()
        await settle()
        assert leaves.task.done() and leaves.sent == []
        late = Caller(door, b"d")
        await settle()
        app.may_answer.set()
        assert [await caller.status() for caller in (first, stays, late)] == [200] * 3
        assert app.begun == [b"a", b"c", b"d"]

    run(test)


def test_a_request_whose_turn_does_not_come_in_time_is_not_begun() -> None:
    async def test(app: Slow, door: OneByOne) -> None:
        first, second = Caller(door, b"a"), Caller(door, b"b")
        assert await second.status() == 503 and app.begun == [b"a"]
        app.may_answer.set()
        assert [await first.status(), await Caller(door, b"c").status()] == [200, 200]

    run(test)


def test_a_body_that_is_too_large_is_refused_while_it_arrives_and_the_client_is_not_cut_off() -> None:
    async def test(app: Slow, door: OneByOne) -> None:
        caller = Caller(door, *[b"x" * 60] * 10)
        assert await caller.status() == 413
        assert (caller.unread, len(caller.parts), app.begun) == (8, 0, [])
        endless = Caller(door, *[b"x" * 60] * 10, whole=False)
        assert await endless.status() == 413

    run(test)


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def test(app: Slow, door: OneByOne) -> None:
        assert await Caller(door, b"x", whole=False).status() == 408
        app.may_answer.set()
        assert await Caller(door, b"y").status() == 200

    run(test)


def test_what_the_check_refuses_is_a_sentence_and_keeps_nobody_waiting() -> None:
    def refuse(headers: Any, body: bytes) -> None:
        raise ValueError("That is wrong: expected another")

    async def test() -> None:
        caller = Caller(OneByOne(Slow(), "/draw", refuse, LIMITS), b"x")
        assert await caller.status() == 400
        assert json.loads(caller.sent[1]["body"])["message"] == "That is wrong: expected another"

    in_a_loop(test())


@pytest.mark.parametrize(
    ("host", "is_known"),
    [
        ("localhost:80", True), ("127.0.0.1", True), ("[::1]:7", True), ("gpu7", True), ("GPU7:443", True),
        ("a.b.example", True),
        ("b.example", False), ("gpu7.evil.example", False), ("10.0.0.1", False), ("127.0.0.1.evil.example", False), ("", False),
    ],
)  # fmt: skip
def test_a_listener_answers_to_loopback_and_to_what_the_environment_names(host, is_known, monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "gpu7, *.b.example,")
    app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("hello"))], middleware=[trusted_hosts()])
    assert TestClient(app).get("/", headers={"Host": host}).status_code == (200 if is_known else 400)
    patterns = for_mlflow({VARIABLE: "gpu7, *.b.example,"})["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert any(fnmatch.fnmatch(host.lower(), pattern) or host.lower() == pattern for pattern in patterns) == is_known


@pytest.mark.parametrize("name", ["*", "gpu7:80", "http://gpu7", "gpu7 gpu8", "a.*", "-"])
def test_what_is_no_name_of_a_host_is_refused_with_a_sentence(name, monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, name)
    with pytest.raises(ValueError, match="expected names of hosts without port, such as gpu7,gpu7.example"):
        trusted_hosts()
    with pytest.raises(ValueError, match=VARIABLE):
        for_mlflow({VARIABLE: name})
