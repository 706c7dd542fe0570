"""Concurrent, retrying client for an OpenAI-compatible server (vLLM, for example): it gives up in bounded time.

The key, where the server wants one, is `KEY_VARIABLE`'s: no parameter, message or file holds it.
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
#: Seconds for one answer: a long hint of a large teacher, behind the questions of all other processes.
TIMEOUT = 300.0
#: How often a request is tried again: openai's pauses (0.5, 1, 2, 4, 8, 8, … s) last two minutes, a server's restart.
RETRIES = 20
#: Most requests at a time; eight processes fill the 256 sequences that vLLM computes at a time.
CONCURRENCY = 32
#: The most seconds until a server is given up: openai waits for a ``Retry-After`` of up to two minutes.
PATIENCE = (RETRIES + 1) * (TIMEOUT + 120.0)
#: Seconds to a connection: a machine that drops packets is not there.
_CONNECT = 30.0
#: Seconds between two lines that say that answers are waited for.
_BETWEEN_LINES = 60.0

#: Refusals of a server that may do better later: openai tries again after these.
_PASSING = (408, 409, 429)

Body = Mapping[str, Any]
Read = TypeVar("Read")


class TeacherServerError(RuntimeError):
    """The served teacher is of no use: the sentence names the server, what it did, and what to do."""


class ChatClient:
    """Asks for chat completions, many at a time.

    Args:
        url: where the API begins: ``http://host:8000/v1``.
        timeout: seconds for the answer to one request.
        retries: how often a request is tried again that failed in a way that may pass: no connection, no answer in
            time, HTTP 408, 409, 429 or 5xx; after a longer pause where the server asks for one (``Retry-After``).
        concurrency: most requests at a time.

    Raises:
        TeacherServerError: proxies or certificates that the environment names cannot be used.
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
        except (ImportError, ValueError, OSError) as error:  # of httpx: a SOCKS proxy, a proxy's address, certificates
            raise TeacherServerError(
                f"no connection to the teacher at {self.url} can be made as the environment's proxies and certificates "
                f"say ({self._plain(str(error))}): exempt its host by NO_PROXY, or unset ALL_PROXY, HTTP_PROXY, "
                "HTTPS_PROXY or SSL_CERT_FILE"
            ) from error

    def ask_all(self, bodies: Sequence[Body], read: Callable[[int, Any], Read]) -> list[Read]:
        """What ``read`` makes of the answer to each body (its place, openai's ``ChatCompletion``), in their order.

        The first failure ends all: nothing further is sent or tried again. A body holds the arguments of openai's
        ``chat.completions.create``. openai validates nothing, not even that it is JSON: ``read`` has to.

        Raises:
            TeacherServerError: the server refuses what it is asked, or stays away.
        """
        asked = asyncio.run_coroutine_threadsafe(self._ask_all(bodies, read), _event_loop())
        try:
            while not wait([asked], timeout=_BETWEEN_LINES).done:
                what = f"for an answer of the teacher at {self.url}, {len(bodies)} questions in all"
                print(f"kepo: waiting {what}", file=sys.stderr, flush=True)
            return asked.result()
        finally:
            asked.cancel()  # where the wait was interrupted

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
            return error.doc  # as openai does with an answer that is not declared to be JSON
        except openai.APIConnectionError as error:
            raise self._away(f"{type(error.__cause__).__name__}: {str(error.__cause__) or error.message}") from error
        except openai.APIStatusError as error:
            told = error.body
            said = str(told["message"] if isinstance(told, dict) and "message" in told else error.response.text)
            if error.status_code >= 500 or error.status_code in _PASSING:
                raise self._away(f"HTTP {error.status_code}: {said}") from error
            raise TeacherServerError(
                f"the teacher at {self.url} refuses what it is asked (HTTP {error.status_code}): {self._plain(said)}"
            ) from error

    def _away(self, reason: str) -> TeacherServerError:
        return TeacherServerError(
            f"the teacher at {self.url} stays away, tried up to {self._retries + 1} times: start it again, or name "
            f"another address ({self._plain(reason)})"
        )

    def _plain(self, text: str) -> str:
        """A text's beginning on one line, printable and without the key."""
        if self._key:
            text = text.replace(self._key, f"${KEY_VARIABLE}")
        words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return words[:300] + "…" * (len(words) > 300)


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """A loop of its own for all clients, as a notebook's thread runs one already.

    The thread is a daemon: at its end, the interpreter waits for no server.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="teacher", daemon=True).start()
    return loop
