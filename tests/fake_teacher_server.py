"""A stand-in for vLLM's OpenAI-compatible server on loopback: the same interface, over a model of this process."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image

from kepo_core.method.teacher import tokenizer_of

#: What vLLM's chat endpoint takes, as far as it is asked for here.
FIELDS = {
    *("model", "messages", "max_tokens", "temperature", "add_generation_prompt", "continue_final_message"),
    *("prompt_logprobs", "return_token_ids", "chat_template_kwargs"),
}
#: (status, headers, body) in place of an answer.
Reply = tuple[int, dict[str, str], bytes]


def error(status: int, message: str, **headers: str) -> Reply:
    """An error as vLLM words it."""
    return status, headers, json.dumps({"error": {"message": message, "code": status}}).encode()


class FakeVLLM:
    """What is served, and what goes wrong with it.

    ``trouble(n)`` may reply in place of the n-th answer (from 0), or wait; ``bend(answer)`` may spoil a right one.
    ``bodies`` are the requests and ``headers`` their headers, in the order of their arrival; ``most`` is how many were
    open at a time.
    """

    def __init__(self, model: Any, processor: Any, name: str = "embedded:teacher") -> None:
        self.model, self.processor, self.name, self.url = model, processor, name, ""
        self.trouble: Callable[[int], Reply | None] = lambda n: None
        self.bend: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.open = self.most = 0
        self._counting, self._computing = threading.Lock(), threading.Lock()

    def reply(self, path: str, headers: dict[str, str], sent: bytes) -> Reply:
        body = json.loads(sent)
        with self._counting:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(headers)
            self.open += 1
            self.most = max(self.most, self.open)
        try:
            if (instead := self.trouble(number)) is not None:
                return instead
            if path != "/v1/chat/completions":
                return error(404, "Not Found")
            if unknown := body.keys() - FIELDS:
                return error(400, f"unknown fields: {unknown}")
            if body["model"] != self.name:
                return error(404, f"The model `{body['model']}` does not exist.")
            with self._computing, torch.no_grad():
                answer = self.answer(body)
            return 200, {}, json.dumps(self.bend(answer)).encode()
        finally:
            with self._counting:
                self.open -= 1

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        images: list[Image.Image] = []
        messages = [{"role": m["role"], "content": self._read(m["content"], images)} for m in body["messages"]]
        text = self.processor.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=body.get("add_generation_prompt", True),
            continue_final_message=body.get("continue_final_message", False),
            **body.get("chat_template_kwargs", {}),
        )
        pictures = {"images": [images]} if images else {"add_special_tokens": False}
        inputs = self.processor(text=[text], **pictures, return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        tokenizer = tokenizer_of(self.processor)
        eos = tokenizer.eos_token_id
        out = self.model.generate(**inputs, do_sample=False, max_new_tokens=body["max_tokens"], eos_token_id=eos)
        said = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        answer: dict[str, Any] = {"choices": [{"index": 0, "message": {"role": "assistant", "content": said}}]}
        if body.get("return_token_ids"):
            answer["prompt_token_ids"] = ids
        if (k := body.get("prompt_logprobs")) is not None:
            answer["prompt_logprobs"] = [None, *self._told(self.model(**inputs).logits[0], ids, k)]
        return answer

    def _told(self, logits: torch.Tensor, ids: list[int], k: int) -> Iterator[dict[str, Any]]:
        """At each place the k likeliest tokens, and the one that is there, by their ids as texts."""
        log_probs = logits.log_softmax(-1)[:-1]
        order = log_probs.argsort(-1, descending=True).tolist()
        for token, ranked, values in zip(ids[1:], order, log_probs.tolist(), strict=True):
            there = ranked.index(token)
            told = ranked[:k] if there < k else [*ranked[:k], token]
            yield {
                str(i): {"logprob": values[i], "rank": (rank if rank < k else there) + 1} for rank, i in enumerate(told)
            }

    def _read(self, content: Any, images: list[Image.Image]) -> Any:
        if isinstance(content, str):
            return content
        parts = []
        for part in content:
            if part["type"] == "image_url":
                kind, _, data = part["image_url"]["url"].partition(";base64,")
                assert kind == "data:image/png"
                images.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
                part = {"type": "image"}
            parts.append(part)
        return parts


@contextmanager
def serving(fake: FakeVLLM) -> Iterator[FakeVLLM]:
    """``fake`` at ``fake.url`` while the context lasts; behind it, nobody listens there."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            status, headers, body = fake.reply(self.path, dict(self.headers), sent)
            try:
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | headers).items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                self.close_connection = True  # the other side has lost its patience

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def late(seconds: float) -> Callable[[int], None]:
    """Trouble: every answer comes that late."""
    return lambda number: time.sleep(seconds)
