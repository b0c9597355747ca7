"""What a request may cost: bytes of its body, a place among those that wait, and time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import NamedTuple

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CODES = {
    400: "INVALID_PARAMETER_VALUE",
    408: "REQUEST_TIMEOUT",
    413: "REQUEST_LIMIT_EXCEEDED",
    503: "TEMPORARILY_UNAVAILABLE",
}


class Limits(NamedTuple):
    """Of the requests of a path."""

    body: int  # bytes; more is answered 413
    reading: float  # seconds within which a body must arrive; else 408
    waiting: int  # how many may wait for their turn; others are answered 503
    seconds: float  # within which the turn must come; else 503


class OneByOne:
    """Passes the POST requests of a path on in their order, one at a time, after they were read and checked.

    A request whose client has gone meanwhile is not begun: what nobody waits for would keep all others waiting.
    """

    def __init__(self, app: ASGIApp, path: str, check: Callable[[Headers, bytes], None], limits: Limits) -> None:
        """check: raises ValueError for what is answered 400."""
        self.app, self.path, self.check, self.limits = app, path, check, limits
        self.present, self.turn = 0, asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) != ("POST", self.path):
            await self.app(scope, receive, send)
            return
        has_arrived = False
        try:
            with self._place():
                request = Request(scope, receive)
                body = await self._read(request)
                has_arrived = True
                self._check(request.headers, body)
                gone = asyncio.ensure_future(receive())  # nothing comes after the body but the end of the connection
                try:
                    async with self._turn(gone):
                        messages = [{"type": "http.request", "body": body}]

                        async def again() -> Message:
                            return messages.pop() if messages else await asyncio.shield(gone)

                        await self.app(scope, again, send)
                finally:
                    gone.cancel()
        except ClientDisconnect:
            pass
        except HTTPException as error:
            if has_arrived:
                await _refusal(error)(scope, receive, send)
            else:
                await _answer_early(_refusal(error), scope, receive, send, self.limits.reading)

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        if self.present > self.limits.waiting:  # one of them is being answered
            raise _busy(f"{self.limits.waiting} requests wait already")
        self.present += 1
        try:
            yield
        finally:
            self.present -= 1

    async def _read(self, request: Request) -> bytes:
        most, seconds, body = self.limits.body, self.limits.reading, b""
        try:
            async with asyncio.timeout(seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > most:
                        raise HTTPException(
                            413, f"The body has more than {most:,} bytes, the most that is read: send less"
                        )
        except TimeoutError:
            raise HTTPException(
                408,
                f"The body did not arrive within {seconds:g} s, or is shorter than its Content-Length: send it again",
            ) from None
        return body

    def _check(self, headers: Headers, body: bytes) -> None:
        try:
            self.check(headers, body)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None

    @contextlib.asynccontextmanager
    async def _turn(self, gone: asyncio.Future[Message]) -> AsyncIterator[None]:
        mine = asyncio.ensure_future(self.turn.acquire())
        try:
            await asyncio.wait((mine, gone), timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise ClientDisconnect
            if not mine.done():
                raise _busy(f"its turn did not come within {self.limits.seconds:g} s")
            yield
        finally:
            if mine.done() and not mine.cancelled():
                self.turn.release()
            mine.cancel()


async def _answer_early(answer: JSONResponse, scope: Scope, receive: Receive, send: Send, seconds: float) -> None:
    """Answer before the body has arrived, and end after it: a client that is cut off while it sends sees no answer."""

    async def unended(message: Message) -> None:
        await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

    await answer(scope, receive, unended)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while (await receive()).get("more_body"):
                pass
    await send({"type": "http.response.body"})


def _busy(why: str) -> HTTPException:
    return HTTPException(503, f"The server is busy ({why}): ask again later", {"Retry-After": "5"})


def _refusal(error: HTTPException) -> JSONResponse:
    """In the form of MLflow's own."""
    content = {"error_code": CODES[error.status_code], "message": error.detail}
    return JSONResponse(content, error.status_code, error.headers)
