"""A concurrent client with retries for an OpenAI-compatible server, for example vLLM; it gives up in bounded time.

If the server requires a key, set it in the environment variable `KEY_VARIABLE`: no parameter, message or file holds it.
"""

import asyncio
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import wait
from functools import cache
from typing import Any, TypeVar

import openai

KEY_VARIABLE = "KEPO_TEACHER_KEY"
#: Seconds for one answer: enough for a long hint from a large teacher that queues behind all other processes.
TIMEOUT = 300.0
#: Number of retries: openai's pauses (0.5, 1, 2, 4, 8, 8, … s) last two minutes in all, enough for a server's restart.
RETRIES = 20
#: Maximum number of requests in flight; eight processes fill the 256 sequences of vLLM's batch.
CONCURRENCY = 32
#: Maximum seconds until the client gives up: openai honours a ``Retry-After`` of up to two minutes.
PATIENCE = (RETRIES + 1) * (TIMEOUT + 120.0)
#: Seconds to connect: some machines drop packets and never refuse.
_CONNECT = 30.0
#: Seconds between two messages that say that the client is waiting.
_BETWEEN_LINES = 60.0

#: Temporary refusals (HTTP status), which openai retries.
_PASSING = (408, 409, 429)

Body = Mapping[str, Any]
Read = TypeVar("Read")


class TeacherServerError(RuntimeError):
    """The served teacher cannot be used: the message names the server, what it did, and what to do."""


class ChatClient:
    """Requests chat completions, many at a time.

    Args:
        url: base address of the API, for example ``http://host:8000/v1``.
        timeout: seconds for the answer to one request.
        retries: number of retries after a temporary failure: no connection, no answer in time, HTTP 408, 409, 429 or
            5xx. A server may ask for a longer pause (``Retry-After``).
        concurrency: maximum number of requests in flight.

    Raises:
        TeacherServerError: the environment's proxies or certificates cannot be used.
    """

    def __init__(
        self, url: str, *, timeout: float = TIMEOUT, retries: int = RETRIES, concurrency: int = CONCURRENCY
    ) -> None:
        self.url = url.rstrip("/")
        self._retries, self._concurrency = retries, concurrency
        self._key = os.environ.get(KEY_VARIABLE, "")
        try:
            self._api = openai.AsyncOpenAI(
                base_url=self.url,
                api_key=self._key or "none",  # without one, openai would send $OPENAI_API_KEY, another service's
                timeout=openai.Timeout(timeout, connect=min(timeout, _CONNECT)),
                max_retries=retries,
            )
        except (ImportError, ValueError, OSError) as error:  # httpx: a SOCKS proxy, a proxy's address, certificates
            raise TeacherServerError(
                f"cannot connect to the teacher at {self.url} with the environment's proxies and certificates "
                f"({self._plain(str(error))}): exempt its host by NO_PROXY, or unset ALL_PROXY, HTTP_PROXY, "
                "HTTPS_PROXY or SSL_CERT_FILE"
            ) from error

    def ask_all(self, bodies: Sequence[Body], read: Callable[[int, Any], Read]) -> list[Read]:
        """Send all ``bodies`` and return ``read(index, answer)`` for each, in order.

        The first failure cancels all other requests and retries.

        Args:
            bodies: arguments of openai's ``chat.completions.create``.
            read: gets openai's ``ChatCompletion``, and must validate it: openai does not even check that it is JSON.

        Raises:
            TeacherServerError: the server rejects a request, or does not answer.
        """
        asked = asyncio.run_coroutine_threadsafe(self._ask_all(bodies, read), _event_loop())
        try:
            while not wait([asked], timeout=_BETWEEN_LINES).done:
                what = f"for the teacher at {self.url} ({len(bodies)} requests in all)"
                print(f"kepo: waiting {what}", file=sys.stderr, flush=True)
            return asked.result()
        finally:
            asked.cancel()  # if the wait was interrupted

    async def _ask_all(self, bodies: Sequence[Body], read: Callable[[int, Any], Read]) -> list[Read]:
        free = asyncio.Semaphore(self._concurrency)

        async def ask(place: int) -> Read:
            async with free:
                return read(place, await self._ask(bodies[place]))

        tasks = [asyncio.ensure_future(ask(place)) for place in range(len(bodies))]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(self, body: Body) -> Any:
        try:
            return await self._api.chat.completions.create(**body)
        except json.JSONDecodeError as error:
            return error.doc  # as openai does for an answer that does not claim to be JSON
        except openai.APIConnectionError as error:
            raise self._away(f"{type(error.__cause__).__name__}: {str(error.__cause__) or error.message}") from error
        except openai.APIStatusError as error:
            told = error.body
            said = str(told["message"] if isinstance(told, dict) and "message" in told else error.response.text)
            if error.status_code >= 500 or error.status_code in _PASSING:
                raise self._away(f"HTTP {error.status_code}: {said}") from error
            raise TeacherServerError(
                f"the teacher at {self.url} rejects the request (HTTP {error.status_code}): {self._plain(said)}"
            ) from error

    def _away(self, reason: str) -> TeacherServerError:
        return TeacherServerError(
            f"the teacher at {self.url} does not answer, tried up to {self._retries + 1} times: restart the server, or "
            f"set another address ({self._plain(reason)})"
        )

    def _plain(self, text: str) -> str:
        """The beginning of a text on one line, printable and without the key."""
        if self._key:
            text = text.replace(self._key, f"${KEY_VARIABLE}")
        words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return words[:300] + "…" * (len(words) > 300)


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One event loop for all clients, in a thread of its own, because a notebook's thread already runs one.

    The thread is a daemon: the interpreter does not wait for a server when it exits.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="teacher", daemon=True).start()
    return loop
