"""Hints from a real OpenAI-compatible server: ``transformers serve`` on loopback, with the embedded teacher."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from kepo_harness import hint_prompt

from kepo_core.data import phantom
from kepo_core.experiment import experiment
from kepo_core.experiment.models import EMBEDDED_DIR, load_processor
from kepo_core.method.chat_client import ChatClient
from kepo_core.method.served import ServedTeacher
from kepo_core.params import Params
from kepo_core.task.dataset import to_dataset

pytestmark = pytest.mark.slow

#: AutoProcessor returns a bare tokenizer where torchvision is missing: the server is given the image-only processor.
LAUNCHER = """
import sys
from transformers import AutoProcessor
from kepo_core.experiment.models import load_processor
AutoProcessor.from_pretrained = staticmethod(lambda name, **_: load_processor(name, "teacher"))
from transformers.cli.transformers import main
main()
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    command = [sys.executable, "-c", LAUNCHER, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30).close()
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def test_hints_of_transformers_serve_are_about_their_pictures(url: str, tmp_path: Path) -> None:
    phantom.write_phantom(tmp_path / "world", 0, {"MRI": 12})
    data = experiment.load_data(Params(data_root=str(tmp_path / "world"), train_items=8, eval_items=1))
    prompts = [hint_prompt(row) for row in to_dataset(data.train, thinking=True)]
    client = ChatClient(url, timeout=120, retries=2, concurrency=2)
    name = str(EMBEDDED_DIR / "teacher")
    teacher = ServedTeacher(client, name, load_processor("embedded:teacher"), top_k=1, hints=tmp_path / "hints")
    hints = teacher.write_hints(prompts, max_tokens=32)
    assert all(hints) and len(set(hints)) > 1
    facts = phantom.load_facts(data.root)
    told = 0
    for question, hint in zip(data.train, hints, strict=True):
        evidence = phantom.topic_of(question.question).evidence
        shown = facts[next(key for key in facts if str(question.image).endswith(key))]
        told += hint == evidence.format(**{field: getattr(shown, field) for field in shown.__dataclass_fields__})
    assert told >= 6  # of 8, as the teacher itself does
