"""Questions to a server that is slow, wrong, busy, refusing or dead: bounded tries, and one clear sentence."""

import io
import json
import subprocess
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_teacher_server import FakeVLLM, error, late, serving
from kepo_harness import picture
from PIL import Image

from kepo_core.method.chat_client import (
    KEY_VARIABLE,
    ChatClient,
    TeacherRefusedError,
    TeacherUnreachableError,
    as_sent,
)
from kepo_core.method.task import with_images
from kepo_core.params import project_root

BODY = {"model": "embedded:teacher", "messages": []}


class Echo(FakeVLLM):
    """Answers with what it was asked."""

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"asked": body}


@pytest.fixture
def server() -> Iterator[Echo]:
    with serving(Echo(None, None)) as served:
        yield served


def client(server: FakeVLLM, **options: Any) -> ChatClient:
    return ChatClient(server.url, **{"timeout": 5, "retries": 2, "concurrency": 4, "first_pause": 0.01} | options)


def ask(server: FakeVLLM, count: int = 1, **options: Any) -> list[Any]:
    bodies = [BODY | {"max_tokens": n} for n in range(count)]
    return client(server, **options).ask_all(bodies, lambda place, answer: (place, answer["asked"]["max_tokens"]))


def at(*numbers: int, reply: Any) -> Callable[[int], Any]:
    return lambda number: reply if number in numbers else None


def test_answers_come_in_order_and_together(server: Echo) -> None:
    server.trouble = late(0.1)
    started = time.monotonic()
    assert ask(server, 12) == [(n, n) for n in range(12)]
    assert server.most == 4
    assert 0.3 <= time.monotonic() - started < 1.1  # three rounds of four
    assert ask(server, 0) == []


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_what_may_pass_is_asked_again(server: Echo, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    server.trouble = at(0, 1, reply=error(status, "not now"))
    assert ask(server) == [(0, 0)]
    assert len(server.bodies) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and server.url in lines[0] and f"HTTP {status}: not now" in lines[0]


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_final_and_says_why(server: Echo, status: int) -> None:
    server.trouble = at(0, reply=error(status, "maximum context length is 4096\ntokens\x1b[31m"))
    with pytest.raises(TeacherRefusedError, match=rf"{server.url} .*HTTP {status}.: maximum .* is 4096 tokens \[31m$"):
        ask(server)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (error(500, "out of memory"), "HTTP 500: out of memory"),
        ((200, {}, b"<html>starting</html>"), "no JSON: <html>starting</html>"),
        ((200, {}, b"[1]"), r"no JSON object: \[1\]"),
        ((502, {}, b""), "HTTP 502: nothing"),
    ],
)
def test_a_server_that_stays_wrong_ends_it(server: Echo, reply: Any, said: str) -> None:
    server.trouble = lambda number: reply
    with pytest.raises(
        TeacherUnreachableError, match=rf"{server.url} stays away \(tries: 3, over 0 s; the last: {said}\)"
    ):
        ask(server)
    assert len(server.bodies) == 3


def test_a_slow_server_is_given_up_in_bounded_time(server: Echo) -> None:
    server.trouble = late(1.0)
    started = time.monotonic()
    with pytest.raises(TeacherUnreachableError, match=r"tries: 2, .* nothing within 0.1 s \(ReadTimeout\)"):
        ask(server, timeout=0.1, retries=1)
    assert time.monotonic() - started < 0.9


def test_a_dead_server_ends_it() -> None:
    """What to do then depends on who asks: `kepo run` says that its run can be resumed."""
    with serving(Echo(None, None)) as server:
        pass
    with pytest.raises(TeacherUnreachableError, match=r"tries: 3, .*ConnectError: [^;`]*$"):
        ask(server)


def test_pauses_double_and_respect_what_the_server_asks_for(server: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    original = ChatClient._pause
    monkeypatch.setattr(ChatClient, "_pause", lambda self, state: pauses.append(original(self, state)) or 0.0)
    server.trouble = lambda n: error(429, "no", Retry_After="7") if n == 3 else error(503, "no") if n < 5 else None
    ask(server, retries=8, first_pause=1.0)
    for pause, least in zip(pauses, (1, 2, 4, 8, 16), strict=True):
        assert least <= pause <= 1.25 * least
    pauses.clear()
    server.bodies.clear()
    server.trouble = at(0, reply=error(429, "no", Retry_After="7"))
    ask(server, first_pause=1.0)
    assert pauses == [7.0]
    pauses.clear()
    server.trouble = lambda n: error(503, "no") if len(pauses) < 9 else None
    ask(server, retries=9, first_pause=1.0)
    assert 60 <= pauses[-1] <= 75


def test_the_first_failure_ends_all(server: Echo) -> None:
    server.trouble = lambda number: error(400, "no") if number == 0 else late(0.05)(number)
    with pytest.raises(TeacherRefusedError):
        ask(server, 40, concurrency=2)
    time.sleep(0.3)
    assert len(server.bodies) <= 4
    with pytest.raises(KeyError):  # of what reads the answers, too
        client(server).ask_all([BODY] * 3, lambda place, answer: answer["missing"])


def test_who_pauses_when_another_fails_does_not_ask_again(server: Echo) -> None:
    server.trouble = lambda number: error(400, "no") if number == 3 else error(503, "busy")
    with pytest.raises(TeacherRefusedError):
        ask(server, 4, concurrency=4, retries=9, first_pause=0.5)
    time.sleep(0.2)
    assert len(server.bodies) == 4


HANGING = """
import sys
from kepo_core.method.chat_client import ChatClient, TeacherRefusedError
client = ChatClient(sys.argv[1], timeout=60, retries=2, concurrency=4)
try:
    client.ask_all([{}] * 4, lambda place, answer: answer)
except TeacherRefusedError:
    print("refused", flush=True)
"""


def test_a_process_that_gives_up_ends_at_once(server: Echo) -> None:
    """It waits for none of the requests that the server has not answered yet."""
    server.trouble = lambda number: error(400, "no") if number == 3 else late(30)(number)
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, server.url], stdout=subprocess.PIPE, text=True, cwd=project_root()
    )
    assert process.stdout is not None and process.stdout.readline() == "refused\n"
    refused = time.monotonic()
    assert process.wait(timeout=20) == 0
    assert time.monotonic() - refused < 3 and len(server.bodies) == 4


def test_the_key_is_the_environments_and_stays_out_of_messages(
    server: Echo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(server)
    assert "Authorization" not in {name.title() for name in server.headers[-1]}
    monkeypatch.setenv(KEY_VARIABLE, "s3cret")
    server.trouble = lambda number: error(503, "no") if number == 1 else error(401, "Unauthorized")
    with pytest.raises(TeacherRefusedError) as caught:
        ask(server)
    assert {name.title(): value for name, value in server.headers[-1].items()}["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(caught.value) + capsys.readouterr().err


def test_pictures_are_sent_whole_and_in_their_places() -> None:
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
              {"role": "assistant", "content": "two"}]  # fmt: skip
    images = [picture((200, 10, 30)), picture((1, 2, 3))]
    sent = json.loads(json.dumps(as_sent(with_images(prompt, {"images": images}))))
    assert [part["type"] for part in sent[0]["content"]] == ["image_url", "text", "image_url"]
    assert sent[0]["content"][1]["text"] == "and"
    assert sent[1] == {"role": "assistant", "content": [{"type": "text", "text": "two"}]}
    for part, image in zip(sent[0]["content"][::2], images, strict=True):
        data = part["image_url"]["url"].removeprefix("data:image/png;base64,")
        assert Image.open(io.BytesIO(b64decode(data))).tobytes() == image.tobytes()
    with pytest.raises(ValueError, match="an image part holds None, expected a PIL image"):
        as_sent(prompt)
