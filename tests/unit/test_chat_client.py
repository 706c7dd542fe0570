"""Questions to a server that is slow, wrong, busy, refusing or dead: bounded tries, and one clear sentence."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_teacher_server import FakeVLLM, error, late, serving

from kepo_core.method import chat_client
from kepo_core.method.chat_client import KEY_VARIABLE, ChatClient, TeacherServerError
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
    return ChatClient(server.url, **{"timeout": 5, "retries": 2, "concurrency": 4} | options)


def ask(server: FakeVLLM, count: int = 1, **options: Any) -> list[Any]:
    bodies = [BODY | {"max_tokens": n} for n in range(count)]
    return client(server, **options).ask_all(bodies, lambda place, answer: (place, answer.asked["max_tokens"]))


def at(*numbers: int, reply: Any) -> Callable[[int], Any]:
    return lambda number: reply if number in numbers else None


def test_answers_come_in_order_and_together(server: Echo) -> None:
    server.trouble = late(0.1)
    started = time.monotonic()
    assert ask(server, 12) == [(n, n) for n in range(12)]
    assert server.most == 4
    assert 0.3 <= time.monotonic() - started < 1.1  # three rounds of four
    assert ask(server, 0) == []


def soon(status: int, message: str) -> Any:
    """An error after which the server wants to be asked again at once: openai's own pauses begin at half a second."""
    return error(status, message, Retry_After_Ms="10")


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_what_may_pass_is_asked_again(server: Echo, status: int) -> None:
    server.trouble = at(0, 1, reply=soon(status, "not now"))
    assert ask(server) == [(0, 0)]
    assert len(server.bodies) == 3


def test_it_is_said_that_answers_are_waited_for(
    server: Echo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(server)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(chat_client, "_BETWEEN_LINES", 0.2)
    server.trouble = late(0.5)
    ask(server)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 2 and all(server.url in line for line in lines)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_final_and_says_why(server: Echo, status: int) -> None:
    server.trouble = at(0, reply=error(status, "maximum context length is 4096\ntokens\x1b[31m"))
    with pytest.raises(TeacherServerError, match=rf"{server.url} .*HTTP {status}.: maximum .* is 4096 tokens \[31m$"):
        ask(server)
    assert len(server.bodies) == 1
    server.trouble = lambda number: (422, {}, b'{"detail": "' + b"x" * 400 + b'"}')  # not as OpenAI words it
    with pytest.raises(TeacherServerError, match=r': \{"detail": "x{288}…$'):
        ask(server)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (soon(500, "out of memory"), "HTTP 500: out of memory"),
        ((502, {"Retry-After-Ms": "10"}, b""), "HTTP 502:"),
    ],
)
def test_a_server_that_stays_wrong_ends_it(server: Echo, reply: Any, said: str) -> None:
    server.trouble = lambda number: reply
    with pytest.raises(TeacherServerError, match=rf"{server.url} does not answer, tried up to 3 times: .* \({said}\)$"):
        ask(server)
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    "reply", [(200, {}, b"<html>"), (200, {"Content-Type": "text/html"}, b"<html>"), (200, {}, b"[1]")]
)
def test_an_answer_that_is_no_object_is_left_to_the_reader(server: Echo, reply: Any) -> None:
    server.trouble = lambda number: reply
    assert client(server).ask_all([BODY], lambda place, answer: answer) in (["<html>"], [[1]])


def test_a_slow_server_is_given_up_in_bounded_time(server: Echo) -> None:
    server.trouble = late(2.0)
    started = time.monotonic()
    with pytest.raises(TeacherServerError, match=r"tried up to 2 times: .* \(ReadTimeout: Request timed out"):
        ask(server, timeout=0.1, retries=1)
    assert time.monotonic() - started < 1.9


def test_a_dead_server_ends_it() -> None:
    with serving(Echo(None, None)) as server:
        pass
    with pytest.raises(TeacherServerError, match=rf"{server.url} does not answer, .*restart.*ConnectError: [^;`]*$"):
        ask(server, retries=1)


def test_the_pause_that_a_server_asks_for_is_kept(server: Echo) -> None:
    server.trouble = at(0, reply=error(429, "no", Retry_After="2"))
    started = time.monotonic()
    ask(server)
    assert time.monotonic() - started >= 2  # openai's own first pause is 0.5 s at most
    server.trouble = lambda number: error(429, "no", Retry_After="121")
    with pytest.raises(TeacherServerError, match="does not answer"):  # at once: nobody should wait that long
        ask(server)
    assert len(server.bodies) == 3


def test_the_first_failure_ends_all(server: Echo) -> None:
    server.trouble = lambda number: error(400, "no") if number == 0 else late(0.05)(number)
    with pytest.raises(TeacherServerError):
        ask(server, 40, concurrency=2)
    time.sleep(0.3)
    assert len(server.bodies) <= 4
    with pytest.raises(AttributeError):  # of what reads the answers, too
        client(server).ask_all([BODY] * 3, lambda place, answer: answer.missing)


def test_who_pauses_when_another_fails_does_not_ask_again(server: Echo) -> None:
    server.trouble = lambda number: error(400, "no") if number == 3 else error(503, "busy", Retry_After_Ms="500")
    with pytest.raises(TeacherServerError):
        ask(server, 4, concurrency=4, retries=9)
    time.sleep(0.8)
    assert len(server.bodies) == 4


def test_an_interrupted_wait_ends_all(server: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C in the thread that waits."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    server.trouble = late(0.3)
    monkeypatch.setattr(chat_client, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(server, 40, concurrency=2)
    time.sleep(0.8)
    assert len(server.bodies) <= 2


def test_threads_ask_at_the_same_time(server: Echo) -> None:
    """All clients share one event loop."""
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.extend(ask(server, 5))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(found) == sorted([(n, n) for n in range(5)] * 3)


HANGING = """
import sys
from kepo_core.method.chat_client import ChatClient, TeacherServerError
client = ChatClient(sys.argv[1], timeout=60, retries=2, concurrency=4)
try:
    client.ask_all([{"model": "m", "messages": []}] * 4, lambda place, answer: answer)
except TeacherServerError:
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
    monkeypatch.setenv("OPENAI_API_KEY", "another service's")
    ask(server)
    assert authorization(server) == "Bearer none"
    monkeypatch.setenv(KEY_VARIABLE, "s3cret")
    server.trouble = lambda number: soon(503, "no") if number == 1 else error(401, "s3cret is not a key")
    with pytest.raises(TeacherServerError, match=f"[$]{KEY_VARIABLE} is not a key") as caught:
        ask(server)
    assert authorization(server) == "Bearer s3cret"
    assert "s3cret" not in str(caught.value) + capsys.readouterr().err


def authorization(server: FakeVLLM) -> str:
    return {name.title(): value for name, value in server.headers[-1].items()}["Authorization"]
