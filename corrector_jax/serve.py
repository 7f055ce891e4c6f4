"""A web page to search a run with: `--mode=serve`.

    /              the page; its script and style lie beside it in `web/`
    /about         what is searched, as JSON
    /search?query= what every model finds, as JSON

Answers come from one place, a batch at a time: who asks while the devices are busy is answered with
the others who do. Once it serves, nothing is written, and nothing but this is served.
"""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corrector_jax.paths import AnyPath
from corrector_jax.search import (
    AT_ONCE,
    DEPTH,
    Answer,
    Searcher,
    require_count,
    require_query,
)
from corrector_jax.snippet import snippet
from corrector_jax.types import UserError
from corrector_jax.writer import say

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

WAITING = 200
"""Connections at a time; more are told to come back later."""

_HEADERS = {
    # The page asks this server alone and runs no script but its own file.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FILES = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
_LONGEST_TEXT = 5000  # characters of a text that are sent


def serve_run(workdir: AnyPath, *, step: int | None, host: str, port: int, count: int) -> None:
    """Serves the page until it is asked to stop.

    Args:
      workdir: the run's folder.
      step: which checkpoint; None = the newest.
      host: the address to listen at.
      port: 0 = any that is free.
      count: targets shown of each model.

    Raises:
      UserError: there is no run or no checkpoint, starlette or uvicorn is missing, or the address
        cannot be used.
    """
    if missing := [name for name in ("starlette", "uvicorn") if not importlib.util.find_spec(name)]:
        raise UserError(
            f"--mode=serve needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    require_count("config.serve.count", count)
    with _listening(host, port) as listener:
        app = make_app(Searcher(workdir, step=step), count=count, hosts=_hosts(host))
        address = f"[{host}]" if ":" in host else host
        if _hosts(host) == ["*"]:
            say(f"WARNING: whoever can reach {host} can search: there is no password")
        say(f"http://{address}:{listener.getsockname()[1]} (Ctrl-C ends it)")
        _run(app, listener)


def make_app(searcher: Searcher, *, count: int, hosts: list[str]) -> Starlette:
    """The page and what it asks for.

    Args:
      searcher: the models.
      count: targets shown of each.
      hosts: what the Host header may say; ["*"] = anything.

    Returns:
      An ASGI application.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.responses import FileResponse, JSONResponse
    from starlette.routing import Route

    together = _Together(lambda queries: searcher.answers(queries, count=count))
    split = searcher.job.data.splits[searcher.job.final_split]
    about = {
        "data": searcher.job.data.name,
        "targets": searcher.job.size,
        "strategy": searcher.job.config.strategy,
        "step": searcher.position.step,
        "models": searcher.models,
        "depth": DEPTH,
        "examples": searcher.examples(6),
        "queries": len(split.texts),
    }

    def file(request: Request) -> Response:
        return FileResponse(Path(__file__).with_name("web") / _FILES[request.url.path])

    async def search(request: Request) -> Response:
        try:
            query = require_query(request.query_params.get("query", ""))
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse(as_json(await together.ask(query)))

    async def refused(request: Request, error: Exception) -> Response:
        code = error.status_code if isinstance(error, HTTPException) else 500
        said = {404: "there is no such page", 405: "only GET is answered"}.get(code, "it failed")
        return JSONResponse({"error": said}, status_code=code)

    return Starlette(
        routes=[
            *(Route(path, file) for path in _FILES),
            Route("/about", lambda request: JSONResponse(about)),
            Route("/search", search),
        ],
        middleware=[Middleware(_Guard, hosts=hosts)],
        exception_handlers={HTTPException: refused, Exception: refused},
    )


def as_json(answer: Answer) -> dict[str, Any]:
    """An answer as the page reads it: snippets in pieces, so that no text is ever markup."""
    return {
        "query": answer.query,
        "models": {
            name: {
                "milliseconds": round(1000 * answer.seconds[name], 1),
                "hits": [
                    {
                        **hit._asdict(),
                        "text": _valid(hit.text[:_LONGEST_TEXT]),
                        "target": _valid(hit.target),
                        "snippet": [
                            [_valid(text), marked]
                            for text, marked in snippet(answer.query, hit.text)
                        ],
                    }
                    for hit in hits
                ],
            }
            for name, hits in answer.hits.items()
        },
    }


def _valid(text: str) -> str:
    """A text that UTF-8 can hold."""
    return text.encode("utf-8", errors="replace").decode()


class _Together:
    """Answers those who wait together, so many at once as the devices take."""

    def __init__(self, answers: Callable[[list[str]], list[Answer]]) -> None:
        self._answers = answers
        self._waiting: list[tuple[str, asyncio.Future[Answer]]] = []
        self._busy = asyncio.Lock()

    async def ask(self, query: str) -> Answer:
        """The answer, once it is this query's turn."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, future))
        async with self._busy:
            # The lock goes round in order, so the oldest who waits is this one, or it is answered.
            if not future.done():
                await self._answer()
        return await future

    async def _answer(self) -> None:
        batch, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
        try:
            found = await asyncio.to_thread(self._answers, [query for query, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), answer in zip(batch, found, strict=True):
            if not future.done():
                future.set_result(answer)


class _Guard:
    """Refuses requests under another host's name, and says to browsers what a page may do.

    A page of another site can have its own name point at 127.0.0.1 and read what is served there;
    its requests still carry its name.
    """

    def __init__(self, app: Callable[..., Any], *, hosts: list[str]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.datastructures import MutableHeaders
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        app = self._app
        if scope["type"] == "http":
            host = Request(scope).headers.get("host", "").lower()
            name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
            if "*" not in self._hosts and name not in self._hosts:
                app = JSONResponse({"error": f"not served under the name {name}"}, status_code=421)
        await app(scope, receive, guarded)


def _hosts(host: str) -> list[str]:
    """What requests may call this server."""
    if host == "localhost" or _is_loopback(host):
        return ["localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host]
    return ["*"]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens, taken before anything is loaded."""
    where = f"config.serve.host {host!r} and config.serve.port {port}"
    if not 0 <= port < 2**16:
        raise UserError(f"{where} cannot be listened at: write a port below 65536, or 0 for any")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:  # the latter of a name that none can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{where} cannot be listened at ({reason}): write others, or port 0 for any that is "
            "free"
        ) from error


def _run(app: Starlette, listener: socket.socket) -> None:
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            lifespan="off",
            limit_concurrency=WAITING,
            timeout_graceful_shutdown=5,
            server_header=False,
        )
    )
    # uvicorn ends on these, and then hands them on: to be asked to stop is no failure here.
    before = {number: signal.signal(number, _nothing) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _nothing(number: int, frame: object) -> None:
    """Takes a signal that was heeded already."""
