"""Questions to an OpenAI-compatible server (vLLM, say): many at a time, with an end when it stays away.

The key, where the server wants one, is `KEY_VARIABLE`'s: no parameter, message or file holds it.
"""

import base64
import io
import json
import math
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from typing import Any, TypeVar

import httpx
import tenacity
from PIL import Image
from tenacity.stop import stop_when_event_set

KEY_VARIABLE = "KEPO_TEACHER_KEY"
#: The longest pause between two tries, in seconds, unless the server asks for a longer one.
LONGEST_PAUSE = 60.0
#: A pause that a server asks for is kept up to this many seconds.
LONGEST_ASKED = 600.0
#: Seconds between two lines that say that it is being waited for.
_BETWEEN_LINES = 10.0

#: Statuses of a server that may do better later; any other refusal is final.
_PASSING = (408, 429)

Body = Mapping[str, Any]
Read = TypeVar("Read")


class TeacherServerError(RuntimeError):
    """The served teacher is of no use: the sentence names the server, what it did, and what to do."""


class TeacherUnreachableError(TeacherServerError):
    """It did not answer, however often it was asked."""


class TeacherRefusedError(TeacherServerError):
    """It answered that it will not do what was asked."""


class TeacherMismatchError(TeacherServerError):
    """Its answer does not belong to what was asked, token by token, or holds no log-probabilities."""


class _PassingError(Exception):
    """Something that may pass; ``pause`` is how long the server asks to be left alone, in seconds."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class ChatClient:
    """Sends chat completion requests.

    Args:
        url: where the API begins: ``http://host:8000/v1``.
        timeout: seconds for the answer to one request.
        retries: how often a request is tried again that failed in a way that may pass: no connection, no answer in
            time, an answer that is no JSON, HTTP 408, 429 or 5xx.
        concurrency: most requests at a time.
        first_pause: seconds before the second try; it doubles from try to try, up to `LONGEST_PAUSE`.
    """

    def __init__(
        self, url: str, *, timeout: float = 300.0, retries: int = 8, concurrency: int = 32, first_pause: float = 1.0
    ) -> None:
        self.url = url.rstrip("/")
        self._retries, self._concurrency, self._first_pause = retries, concurrency, first_pause
        key = os.environ.get(KEY_VARIABLE)
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=timeout,
            limits=httpx.Limits(max_connections=concurrency),
        )
        # Processes that lost the same server come back at different times. No other random number depends on it.
        self._jitter = random.Random(f"pauses/{os.getpid()}")
        self._said = -math.inf

    def ask_all(self, bodies: Sequence[Body], read: Callable[[int, Any], Read]) -> list[Read]:
        """What ``read`` makes of the answer to each body (its place, the JSON object), in their order.

        The first failure ends all: nothing further is sent or tried again.

        Raises:
            TeacherServerError: as its subclasses say, or whatever ``read`` raises.
        """
        stopped, waiting = threading.Event(), deque(enumerate(bodies))
        answers: list[Future[Read]] = [Future() for _ in bodies]

        def work() -> None:
            while not stopped.is_set():
                try:
                    place, body = waiting.popleft()
                except IndexError:
                    return
                try:
                    answers[place].set_result(read(place, self._ask(body, stopped)))
                except BaseException as error:  # for the thread that waits, which raises it
                    answers[place].set_exception(error)

        # Not an executor, whose threads the interpreter waits for at its end: one may hang on a server for minutes.
        for _ in range(min(self._concurrency, len(bodies))):
            threading.Thread(target=work, name="teacher", daemon=True).start()
        try:
            done, _ = wait(answers, return_when=FIRST_EXCEPTION)
            for answer in done:
                answer.result()
            return [answer.result() for answer in answers]
        finally:
            stopped.set()

    def _ask(self, body: Body, stopped: threading.Event) -> Any:
        started = time.monotonic()
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_PassingError),
            stop=tenacity.stop_after_attempt(self._retries + 1) | stop_when_event_set(stopped),
            wait=self._pause,
            sleep=tenacity.sleep_using_event(stopped),
            before_sleep=self._say,
        )

        def once() -> Any:
            if stopped.is_set():  # while it paused
                raise TeacherServerError("another request has failed")
            return self._ask_once(body)

        try:
            return retrying(once)
        except tenacity.RetryError as error:
            last = error.last_attempt
            raise TeacherUnreachableError(
                f"the teacher at {self.url} stays away (tries: {last.attempt_number}, over "
                f"{time.monotonic() - started:.0f} s; the last: {last.exception()})"
            ) from last.exception()

    def _ask_once(self, body: Body) -> Any:
        try:
            response = self._http.post(f"{self.url}/chat/completions", json=body)
        except httpx.TimeoutException as error:
            raise _PassingError(f"nothing within {self._http.timeout.read:g} s ({type(error).__name__})") from error
        except httpx.TransportError as error:
            raise _PassingError(f"{type(error).__name__}: {error}") from error
        code = response.status_code
        if code >= 500 or code in _PASSING:
            raise _PassingError(f"HTTP {code}: {_shortened(response.text)}", _asked_pause(response))
        if code != 200:
            raise TeacherRefusedError(
                f"the teacher at {self.url} refuses what it is asked (HTTP {code}): {_shortened(response.text)}"
            )
        try:
            answer = response.json()
        except ValueError as error:
            raise _PassingError(f"no JSON: {_shortened(response.text)}") from error
        if not isinstance(answer, dict):
            raise _PassingError(f"no JSON object: {_shortened(response.text)}")
        return answer

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Seconds until the next try: doubling, by up to a quarter longer, and never less than the server asks for."""
        pause = min(self._first_pause * 2 ** (state.attempt_number - 1), LONGEST_PAUSE)
        problem = state.outcome.exception() if state.outcome else None
        asked = problem.pause if isinstance(problem, _PassingError) else 0.0
        return float(max(pause * (1 + self._jitter.random() / 4), asked))

    def _say(self, state: tenacity.RetryCallState) -> None:
        """Tell that it is being waited for: now and then, not for each of many requests."""
        now = time.monotonic()
        if now - self._said < _BETWEEN_LINES:
            return
        self._said = now
        problem = state.outcome.exception() if state.outcome else None
        tries = f"try {state.attempt_number} of {self._retries + 1} failed"
        print(f"kepo: the teacher at {self.url} is asked again ({tries}: {problem})", file=sys.stderr, flush=True)


def _asked_pause(response: httpx.Response) -> float:
    """``Retry-After`` in seconds; 0 where there is none, or a date, which no inference server sends."""
    value = response.headers.get("retry-after", "")
    return min(float(value), LONGEST_ASKED) if value.isdecimal() else 0.0


def _shortened(text: str) -> str:
    """An answer's beginning on one line, printable, with the message alone where it is an OpenAI-style error."""
    try:
        found = json.loads(text)
        text = str(found["error"]["message"])
    except (ValueError, KeyError, TypeError):
        pass
    words = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return words[:300] + "…" * (len(words) > 300) or "nothing"


def as_sent(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Chat messages as the API takes them; the picture of an image part becomes a lossless PNG."""
    return [
        {
            "role": message["role"],
            "content": message["content"]
            if isinstance(message["content"], str)
            else [_part(part) for part in message["content"]],
        }
        for message in messages
    ]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] != "image":
        return {"type": "text", "text": part["text"]}
    if not isinstance(part.get("image"), Image.Image):
        raise ValueError(f"an image part holds {part.get('image')!r}, expected a PIL image: the row has too few")
    return {"type": "image_url", "image_url": {"url": _data_url(part["image"])}}


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
