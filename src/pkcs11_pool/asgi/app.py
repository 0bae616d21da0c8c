"""The ASGI application: which request gets which answer.

It only reads. Nothing that it tells names a key, or holds a template, a PIN or the
text of an error: see :mod:`pkcs11_pool.integrations.status`.

Source: ASGI 3.0, "HTTP & WebSocket ASGI Message Format" and "Lifespan Protocol".
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from pkcs11_pool.asgi.page import PAGE, POLICY
from pkcs11_pool.errors import ForkedProcess, InvalidOption, InvalidType
from pkcs11_pool.faces.pool import TokenPool
from pkcs11_pool.integrations import exposition
from pkcs11_pool.integrations.lifespan import NAME
from pkcs11_pool.integrations.metrics import read
from pkcs11_pool.integrations.status import report
from pkcs11_pool.state import PoolState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, MutableMapping

    Scope = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
    Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
    Answer = tuple[int, str, bytes]

LOCAL: Final = ("localhost", "127.0.0.1", "[::1]")
"""The names by which a browser on the same machine asks."""
_PLAIN: Final = "text/plain; charset=utf-8"
_PROBES: Final = frozenset({"/livez", "/readyz"})
_HEADERS: Final = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", POLICY.encode()),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)


class Guard(Protocol):
    """Says who may look. May be a coroutine function.

    Who is refused gets 403; or 401, with ``challenge`` as ``WWW-Authenticate``, from a
    guard that has one (see :class:`~pkcs11_pool.asgi.BasicAuth`).
    """

    def __call__(self, scope: Mapping[str, Any]) -> bool | Awaitable[bool]:
        """Whether the request with this ASGI scope may look."""


class StatusApp:
    """An ASGI application that shows pools: mount it where operators can reach it.

    ``/`` is a page, ``/status.json`` what it shows, ``/metrics`` for Prometheus. These
    ask the guard and check the ``Host`` header. ``/livez`` and ``/readyz`` answer one
    word to everybody, because probes have no password and ask by an address: 200, or
    503 when a new process is needed or not all pools are ready.

    Args:
        pools: A pool, several, or a callable that gives them at each request. None:
            the pool that a lifespan of :mod:`pkcs11_pool.integrations` has opened.
        guard: Called with the ASGI scope: whether this request may look.
        allow_anonymous: Let everybody look, where the network is the guard.
        allowed_hosts: Names that the ``Host`` header may have, ports aside;
            ``"*.example.org"`` for all below one, ``"*"`` for any. This keeps web pages
            from elsewhere out, that point a name of their own at this server.

    Raises:
        InvalidOption: There is neither a guard nor ``allow_anonymous=True``, or both.
    """

    def __init__(
        self,
        pools: TokenPool
        | Iterable[TokenPool]
        | Callable[[], TokenPool | Iterable[TokenPool]]
        | None = None,
        *,
        guard: Guard | None = None,
        allow_anonymous: bool = False,
        allowed_hosts: Sequence[str] = LOCAL,
    ) -> None:
        if (guard is None) != (allow_anonymous is True):
            raise InvalidOption(
                "who may look? Give either guard=, for example BasicAuth(user, "
                "password), or allow_anonymous=True"
            )
        if guard is not None and not callable(guard):
            raise InvalidType("guard= is a callable that takes an ASGI scope")
        if isinstance(allowed_hosts, str):
            raise InvalidType("allowed_hosts= is a list of names")
        self._pools = pools if pools is None or callable(pools) else _listed(pools)
        self._guard = guard
        self._hosts = frozenset(host.lower() for host in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as an ASGI server wants it."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _answer(self, scope: Scope, send: Send) -> None:
        extra: list[tuple[bytes, bytes]] = []
        if scope["method"] not in ("GET", "HEAD"):
            answer: Answer = (405, _PLAIN, b"this only reads\n")
            extra.append((b"allow", b"GET, HEAD"))
        elif (path := _path(scope)) in _PROBES:
            answer = self._probe(path, scope)
        elif not self._is_host(scope):
            answer = (400, _PLAIN, b"the Host header is none of allowed_hosts\n")
        elif not await self._may_look(scope):
            answer, extra = _refused(self._guard)
        else:
            answer = self._look(path, scope)
        status, media_type, body = answer
        headers = [
            (b"content-type", media_type.encode()),
            (b"content-length", str(len(body)).encode()),
            *_HEADERS,
            *extra,
        ]
        start = {"type": "http.response.start", "status": status, "headers": headers}
        await send(start)
        shown = b"" if scope["method"] == "HEAD" else body
        await send({"type": "http.response.body", "body": shown})

    def _look(self, path: str, scope: Scope) -> Answer:
        if not path:
            return 200, "text/html; charset=utf-8", PAGE
        if path == "/status.json":
            told = json.dumps(report(self._found(scope)), separators=(",", ":"))
            return 200, "application/json", told.encode()
        if path == "/metrics":
            text = exposition.text(read(self._found(scope)))
            return 200, exposition.CONTENT_TYPE, text.encode()
        return 404, _PLAIN, b"there is nothing here\n"

    def _probe(self, path: str, scope: Scope) -> Answer:
        pools = self._found(scope)
        if path == "/livez":
            well, word = not any(map(_is_beyond_help, pools)), b"live\n"
        else:
            # None at all is not ready: the lifespan has not run yet.
            well = bool(pools) and all(map(_is_ready, pools))
            word = b"ready\n"
        return (200, _PLAIN, word) if well else (503, _PLAIN, b"not " + word)

    def _found(self, scope: Scope) -> list[TokenPool]:
        """The pools, as they are now."""
        if self._pools is None:
            pool = scope.get("state", {}).get(NAME)
            return [] if pool is None else [pool]
        return _listed(self._pools()) if callable(self._pools) else self._pools

    def _is_host(self, scope: Scope) -> bool:
        """Whether the ``Host`` header, of which there is one, is allowed."""
        if "*" in self._hosts:
            return True
        given = [value for name, value in scope["headers"] if name == b"host"]
        if len(given) != 1:
            return False
        host = given[0].decode("latin-1").lower()
        name, colon, port = host.rpartition(":")
        if colon and port.isdecimal() and not name.endswith(":"):
            host = name
        parents = [host[at:] for at, letter in enumerate(host) if letter == "."]
        return host in self._hosts or any(f"*{one}" in self._hosts for one in parents)

    async def _may_look(self, scope: Scope) -> bool:
        if self._guard is None:
            return True
        may = self._guard(scope)
        # Only the word yes lets anybody in: a guard that forgets to return does not.
        return (await may if inspect.isawaitable(may) else may) is True


def _listed(pools: TokenPool | Iterable[TokenPool]) -> list[TokenPool]:
    if isinstance(pools, TokenPool):
        return [pools]
    if isinstance(pools, Iterable):
        found = list(pools)
        if all(isinstance(pool, TokenPool) for pool in found):
            return found
    raise InvalidType("pools= are TokenPools, or a callable that gives them")


def _path(scope: Scope) -> str:
    """The path below where the app is mounted, without a slash at its end."""
    path: str = scope["path"]
    # Starlette leaves the place of the mount in the path. Litestar takes it out, and
    # puts a slash behind the rest.
    root = scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :]
    return path.rstrip("/")


def _refused(guard: Guard | None) -> tuple[Answer, list[tuple[bytes, bytes]]]:
    challenge = getattr(guard, "challenge", None)
    if challenge is None:
        return (403, _PLAIN, b"not for you\n"), []
    header = (b"www-authenticate", str(challenge).encode())
    return (401, _PLAIN, b"who are you?\n"), [header]


def _is_ready(pool: TokenPool) -> bool:
    try:
        pool.stats()
    except ForkedProcess:
        return False
    return pool.state is PoolState.READY


def _is_beyond_help(pool: TokenPool) -> bool:
    """Whether so many calls hang that only a new process can help."""
    try:
        stats = pool.stats()
    except ForkedProcess:
        return True
    # As the engine itself decides: the present limit may be lower.
    most = pool._engine.options.max_sessions  # noqa: SLF001  # one package
    return stats.calls_stuck > most


async def _live(receive: Receive, send: Send) -> None:
    """Start and stop where a server runs the app by itself."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
