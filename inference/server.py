"""The HTTP server around an engine: OpenAI's routes, health, metrics and the page.

client -> route -> protocol.py: what is asked -> worker.py: a Job -> the engine
       <- answer.py: events, or one JSON object <- text, as it comes
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import re
import secrets
import time
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from base import to_json

from . import protocol
from .answer import Answer, Echo
from .metrics import Metrics
from .protocol import ApiError, Head, echoed_logprobs
from .worker import RETRY_AFTER, Worker, unexpected

PAGE = Path(__file__).parent / "page"
FILES = {  # path: (file, its type)
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
# Nothing but our own files is loaded or run, whatever a model says
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
FILE_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LOCAL = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"  # origins that may always call
BODY_SECONDS = 30  # in which a request's body has to be here
GONE = 499  # status of an answer that nobody waited for


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server does for its clients at most."""

    queue: int = 128  # completions that wait for a place
    seconds: float = 300.0  # that a request takes
    body: int = 2**20  # bytes


class Server:
    """Routes, and what they share."""

    def __init__(
        self, engine, served, about, limits, api_key=None, origins=(), local=True, thread=None
    ):
        """served: a protocol.Served; about: what /v1/models says of the model besides its name;
        origins: of web pages from elsewhere that may call, "*" for all; local: whether it can be
        reached from this machine only; thread: the Worker's."""
        self.served = served
        self.about = about
        self.limits = limits
        self.api_key = api_key
        self.origins = origins
        self.local = local
        self.worker = Worker(engine, limits.queue, limits.seconds, thread)
        self.created = int(time.time())

        get = {
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.one_model,
            "/metrics": self.show_metrics,
        }
        post = {"/v1/chat/completions": self.chat, "/v1/completions": self.completions}
        routes = [Route(path, self.file, methods=["GET"]) for path in FILES]
        routes += [Route("/health", self.health, methods=["GET"])]
        routes += [Route(path, self.guarded(f), methods=["GET"]) for path, f in get.items()]
        routes += [Route(path, self.guarded(f), methods=["POST"]) for path, f in post.items()]
        self.metrics = Metrics(self.worker, {route.path for route in routes})
        cors = Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_origin_regex=LOCAL,
            allow_methods=["GET", "POST", "OPTIONS"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
        self.app = Starlette(
            routes=routes,
            middleware=[Middleware(Counted, metrics=self.metrics), cors],
            exception_handlers={HTTPException: self.not_here, Exception: self.failed},
            lifespan=self.lifespan,
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, app):
        task = asyncio.create_task(self.worker.run())
        yield
        task.cancel()
        self.worker.close()

    # ----------------------------------------------------------------------------------------------
    # Around every route

    def guarded(self, route):
        """A route for those who may call it, with errors in OpenAI's shape."""

        async def answer(request):
            try:
                self.check_caller(request)
                return await route(request)
            except ApiError as e:
                return error_response(e)
            except ClientDisconnect:
                return Response(status_code=GONE)  # which nobody reads

        return answer

    def check_caller(self, request):
        """Raises ApiError for who has not the key, and for web pages from elsewhere: what listens
        on this machine only can still be reached by every page that its browser shows."""
        if self.api_key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(), self.api_key.encode()):
                said = "expected the server's key in the header Authorization: Bearer KEY"
                raise ApiError(401, said, code="invalid_api_key")
        host = request.headers.get("host", "")
        # A page whose own name has come to mean this machine
        if self.local and self.api_key is None and not re.fullmatch(LOCAL, f"http://{host}"):
            said = f"host {host[:100]!r}: expected localhost, as no key is asked for"
            raise ApiError(403, said, code="host_not_allowed")
        origin = request.headers.get("origin")
        own = origin in (f"http://{host}", f"https://{host}")
        if origin is None or own or "*" in self.origins or origin in self.origins:
            return
        if not re.fullmatch(LOCAL, origin):
            said = f"origin {origin[:100]!r}: expected one that --allow-origin names"
            raise ApiError(403, said, code="origin_not_allowed")

    async def not_here(self, request, error):
        """A path or a method that no route has."""
        said = f"{request.method[:20]} {request.url.path[:100]}: {error.detail}"
        return error_response(ApiError(error.status_code, said, code="not_found"))

    async def failed(self, request, error):
        return error_response(unexpected(error))

    # ----------------------------------------------------------------------------------------------
    # What is there

    async def file(self, request):
        name, kind = FILES[request.url.path]
        return Response((PAGE / name).read_bytes(), headers=FILE_HEADERS, media_type=kind)

    async def health(self, request):
        return JSONResponse(dict(status="ok", model=self.served.model))

    async def show_metrics(self, request):
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    def model_object(self):
        name = self.served.model
        about = dict(id=name, object="model", created=self.created, owned_by="stopwatch")
        return about | self.about

    async def models(self, request):
        return JSONResponse(dict(object="list", data=[self.model_object()]))

    async def one_model(self, request):
        name = request.path_params["name"]
        if name != self.served.model:
            raise ApiError(404, f"model: {name!r} is not served here", "model", "model_not_found")
        return JSONResponse(self.model_object())

    # ----------------------------------------------------------------------------------------------
    # Completions

    async def chat(self, request):
        return await self.complete(request, protocol.read_chat)

    async def completions(self, request):
        return await self.complete(request, protocol.read_completion)

    async def complete(self, request, read):
        """A response to a request for completions. Raises ApiError, ClientDisconnect."""
        asked = read(await self.json_body(request), self.served)
        head = Head(
            id=("chatcmpl-" if asked.chat else "cmpl-") + secrets.token_hex(12),
            created=int(time.time()),
            model=self.served.model,
            chat=asked.chat,
        )
        echoes = None
        if asked.echo:
            asked, echoes = await self.echo(asked)
        job = self.worker.submit(asked)
        answer = Answer(asked, head, job, self.served, echoes, self.worker)
        try:
            if not asked.stream:
                said = await unless_gone(request.receive, answer.whole())
                return Response(to_json(said), media_type="application/json")
            # Errors until there is something to say come with a status of their own
            await unless_gone(request.receive, answer.begin())
        except BaseException:
            job.cancel()
            raise
        return EventStream(answer, self.limits.seconds + BODY_SECONDS)

    async def echo(self, asked):
        """(Asked, an Echo for each request): prompts are said first, with probabilities if those
        are asked for. Then the model begins behind the whole prompt. Raises ApiError."""
        tokenizer = self.served.tokenizer
        requests = []
        echoes = []
        known = {}  # prompt -> its Echo and token ids
        for request in asked.requests:
            prompt = request.prompt
            if prompt not in known:
                text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
                ids = self.worker.ids_of(prompt)
                logprobs = None
                if request.alternatives is not None:
                    scores = await self.worker.score(ids, request.alternatives)
                    ours = isinstance(prompt, str) or prompt[:1] != (tokenizer.eot,)
                    logprobs = echoed_logprobs(ids[ours:], scores[ours:], tokenizer)
                known[prompt] = Echo(text, logprobs), tuple(ids)
            said, ids = known[prompt]
            echoes.append(said)
            if said.logprobs is not None:
                request = dataclasses.replace(request, prompt=ids)
            requests.append(request)
        return asked._replace(requests=requests), echoes

    async def json_body(self, request):
        """The JSON object that a request has. Raises ApiError, ClientDisconnect."""
        body = b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self.limits.body:
                        raise ApiError(413, f"body: expected {self.limits.body} bytes at most")
        except TimeoutError:
            raise ApiError(408, f"body: expected within {BODY_SECONDS} seconds") from None
        try:
            said = json.loads(body, parse_constant=refuse_constant)
        except (ValueError, RecursionError) as e:
            raise ApiError(400, f"body: not JSON: {e}") from None
        if not isinstance(said, dict):
            raise ApiError(400, "body: expected a JSON object")
        return said


class EventStream(StreamingResponse):
    """An answer in pieces. When its client goes, or takes none for too long, it is cancelled."""

    def __init__(self, answer, seconds):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(answer.pieces(), headers=headers, media_type="text/event-stream")
        self.answer = answer
        self.seconds = seconds

    async def __call__(self, scope, receive, send):
        try:
            async with asyncio.timeout(self.seconds):
                await unless_gone(receive, self.stream_response(send))
        except (ClientDisconnect, TimeoutError, OSError):
            pass
        finally:
            self.answer.job.cancel()


class Counted:
    """Counts the requests of an ASGI application, and the seconds until their answers are sent."""

    def __init__(self, app, metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.monotonic()
        status = GONE

        async def sent(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, sent)
        finally:
            self.metrics.count(scope["path"], status, time.monotonic() - begun)


def error_response(error):
    headers = {"Retry-After": str(RETRY_AFTER)} if error.status == 503 else None
    return JSONResponse(error.as_dict(), status_code=error.status, headers=headers)


def refuse_constant(name):
    raise ValueError(f"{name} is none of its numbers")


async def unless_gone(receive, work):
    """What `work` returns; when the client goes first, it is cancelled. Raises ClientDisconnect."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def gone(receive):
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
