"""The HTTP server of the studio's page: who may ask, how much a request may send, how many may wait."""

import socket

import gradio as gr
import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.hosts import trusted_hosts
from studio import edit

SPARE = 64 * 1024  # bytes around a file in its request
MAX_UPLOAD = edit.MAX_BYTES + SPARE
MAX_FORM = 2**20  # bytes of a request without files: the fields of a tab
MAX_PAINTED = 2**23  # of one with a painted layer
WAITING = 32  # requests; others are told that the queue is full
AT_ONCE = 4  # of each button: they wait for the models, each with its pictures in memory


def serve(page: gr.Blocks, address: str, port: int, theme: gr.Theme, css: str) -> None:
    """Until Ctrl-C. Raises OSError if the port is taken."""
    hosts = trusted_hosts()
    Image.MAX_IMAGE_PIXELS = edit.MAX_PIXELS  # of whatever Gradio itself decodes
    with socket.create_server((address, port)) as listener:
        page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE)
        # Without CORSMiddleware Gradio answers pages from elsewhere as it likes
        app = FastAPI(
            middleware=[hosts, Middleware(LimitedBody), Middleware(CORSMiddleware)],
            docs_url=None, redoc_url=None, openapi_url=None,
        )  # fmt: skip
        gr.mount_gradio_app(
            app, page, "/", server_name=address, server_port=port, footer_links=[], run_history=False,
            enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, theme=theme, css=css,
            max_file_size=MAX_UPLOAD,
        )  # fmt: skip
        print(f"Tessera studio: http://{address}:{port} (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)  # open pages listen for ever
        uvicorn.Server(config).run(sockets=[listener])


class LimitedBody:
    """Answers 413 to what is larger than its path needs, while it is read."""

    def __init__(self, app: ASGIApp) -> None:
        self.form, self.others = (
            RequestBodyLimitMiddleware(app, MAX_FORM),
            {
                "/gradio_api/upload": RequestBodyLimitMiddleware(app, MAX_UPLOAD),
                "/gradio_api/component_server": RequestBodyLimitMiddleware(app, MAX_PAINTED + SPARE),
            },
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limited = self.others.get(scope.get("path", "").rstrip("/"), self.form)
        await limited(scope, receive, send)
