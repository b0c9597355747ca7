"""The HTTP server of the studio's page: who may ask, how much a request may send, how many may wait."""

import asyncio
import contextlib
import socket

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.hosts import trusted_hosts
from studio import edit

SPARE = 64 * 1024  # bytes around a file in its request
MAX_UPLOAD = edit.MAX_BYTES + SPARE
MAX_PAINTED = 2**23 + SPARE  # of a request with a painted layer
MAX_FORM = 2**20  # of one without files: the fields of a tab
PAUSE = 4.0  # seconds between two parts of a body
WAITING = 32  # requests; others are told that the queue is full
AT_ONCE = 2  # of those, at a time: each may hold some pictures of the largest size


def serve(page: gr.Blocks, address: str, port: int, theme: gr.Theme, css: str) -> None:
    """Until Ctrl-C. Raises OSError if the port is taken."""
    hosts = trusted_hosts()
    Image.MAX_IMAGE_PIXELS = edit.MAX_PIXELS  # of whatever Gradio itself decodes
    with socket.create_server((address, port)) as listener:
        page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE)
        for button in page.fns.values():
            button.concurrency_id = "all"  # else the limit is one of each button
        # Without a CORSMiddleware Gradio has one of its own, which lets pages from elsewhere read what they ask for
        app = FastAPI(
            middleware=[hosts, Middleware(LimitedBody), Middleware(CORSMiddleware)],
            docs_url=None, redoc_url=None, openapi_url=None,
        )  # fmt: skip
        gr.mount_gradio_app(
            app, page, "/", server_name=address, server_port=port, footer_links=[], run_history=False,
            enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, theme=theme, css=css,
            max_file_size=MAX_UPLOAD, app_kwargs={"exception_handlers": {RequestValidationError: _no_request_of_the_page}},
        )  # fmt: skip
        # As `launch` sets them: without, Gradio takes any file of this machine for an upload, and deletes none
        page.is_running = page.has_launched = True
        print(f"Tessera studio: http://{address}:{port} (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)  # open pages listen for ever
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


async def _no_request_of_the_page(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's own answer repeats the request, and fails at what JSON cannot say, such as NaN."""
    return JSONResponse(
        {"detail": "The request is none that the page sends: see /gradio_api/info for what it may have"}, 422
    )


class LimitedBody:
    """Answers 413 to what is larger than its path needs, 408 to what stops to arrive, while it is read."""

    def __init__(self, app: ASGIApp) -> None:
        self.form, self.others = (
            RequestBodyLimitMiddleware(app, MAX_FORM),
            {
                "/gradio_api/upload": RequestBodyLimitMiddleware(app, MAX_UPLOAD),
                "/gradio_api/component_server": RequestBodyLimitMiddleware(app, MAX_PAINTED),
            },
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_arriving = scope["type"] == "http" and scope["method"] == "POST"

        async def arriving() -> Message:
            nonlocal is_arriving
            try:
                async with asyncio.timeout(PAUSE if is_arriving else None):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"Nothing arrived for {PAUSE:g} s: send the request again") from None
            is_arriving = is_arriving and message.get("more_body", False)
            return message

        limited = self.others.get(scope.get("path", "").rstrip("/"), self.form)
        with contextlib.suppress(ClientDisconnect):  # a page that is closed while it sends is no mistake
            await limited(scope, arriving, send)
