"""What stands before all pages: a rate limit, and a password where the host wants one."""

import base64
import binascii
import secrets
import time
from collections import OrderedDict

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send


MOST_ADDRESSES = 10_000  # that are remembered
# Open without a password: what Gradio asks itself at the start, whether all is well, styles, and what has tokens.
OPEN = ("/gradio_api/startup-events", "/healthz", "/pages/", "/study", "/studies")


class RateLimit:
    """Refuses an address that asks for more than so much a minute, with 429, by a token bucket that holds as much."""

    def __init__(self, app: ASGIApp, per_minute: int):
        self.app, self.per_minute = app, per_minute
        self.buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # what is left, and when it was

    def wait(self, address: str) -> float:
        """Takes one of the address's requests; seconds until there is one, 0 if there was."""
        now = time.monotonic()
        left, when = self.buckets.pop(address, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - when) * self.per_minute / 60)
        self.buckets[address] = (left - 1 if left >= 1 else left), now
        if len(self.buckets) > MOST_ADDRESSES:
            self.buckets.popitem(last=False)
        return 0 if left >= 1 else (1 - left) * 60 / self.per_minute

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds = self.wait(scope["client"][0]) if scope["type"] == "http" and scope.get("client") else 0
        if seconds:
            told = {"error": "Too many requests from your address: wait a moment"}
            answer = JSONResponse(told, 429, {"Retry-After": str(int(seconds) + 1)})
            await answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)


class Password:
    """Asks for a password, by HTTP's own sign-in (RFC 7617; any name), for everything that is not `OPEN`."""

    def __init__(self, app: ASGIApp, password: str):
        self.app, self.password = app, password.encode()

    def is_given(self, header: str) -> bool:
        kind, _, value = header.partition(" ")
        try:
            given = base64.b64decode(value).partition(b":")[2]
        except binascii.Error:
            return False
        return kind.lower() == "basic" and secrets.compare_digest(given, self.password)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope.get("headers", [])}
        guarded = scope["type"] in ("http", "websocket") and not is_open(scope["path"])
        if guarded and not self.is_given(headers.get(b"authorization", "")):
            asked = {"WWW-Authenticate": 'Basic realm="minim", charset="UTF-8"'}
            await JSONResponse({"error": "This page needs the password."}, 401, asked)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def is_open(path: str) -> bool:
    return any(path == place.rstrip("/") or path.startswith(place.rstrip("/") + "/") for place in OPEN)


def doors(per_minute: int, password: str | None) -> list[Middleware]:
    """For the web server, the outermost first: guesses at the password are limited, too."""
    return [
        Middleware(RateLimit, per_minute=per_minute),
        *([Middleware(Password, password=password)] if password else []),
    ]
