"""A real vLLM on the CPU: these tests run in an environment of its own (`make test-vllm`), as no other has one."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from kepo_core.params import Params

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]

#: What vLLM takes of a CPU: 1 GiB for its cache, and no threads bound to cores that other processes use, too.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "HF_HUB_OFFLINE": "1",
}
os.environ.update(SETTINGS)

#: Small steps of many groups, so that some of them fail and explore.
SMALL: dict[str, Any] = {
    "train_items": 64,
    "eval_items": 2,
    "save_steps": 0,
    "prompts_per_step": 4,
    "prompts_per_device": 4,
    "group_size": 4,
    "vllm_max_model_length": 512,
}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Params]:
    """Parameters of a small run with rollouts by vLLM, in a folder of its own."""

    def params(**given: Any) -> Params:
        folder = tmp_path_factory.mktemp("run")
        return Params.load(None, {**SMALL, "use_vllm": True, "run_dir": str(folder / "run"), **given})

    return params


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int, str], Any]]:
    """``serve(folder, port, name)`` → the process of a ``vllm serve`` on loopback, which goes with the tests."""
    started: list[subprocess.Popen[bytes]] = []

    def start(folder: str, port: int, name: str) -> subprocess.Popen[bytes]:
        log = tmp_path_factory.mktemp("served") / "log"
        command = [
            str(Path(sys.executable).with_name("vllm")), "serve", folder, "--served-model-name", name,
            "--host", "127.0.0.1", "--port", str(port),
            "--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--max-logprobs", "20",
            "--logprobs-mode", "processed_logprobs", "--enable-scale-out",
            "--weight-transfer-config", '{"backend": "nccl"}',
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=log.open("wb"), stderr=subprocess.STDOUT)
        started.append(process)
        for _ in range(300):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            except (URLError, OSError):
                time.sleep(1)
            else:
                return process
        raise TimeoutError(log.read_text()[-3000:])

    yield start
    for process in started:
        process.terminate()
        process.wait()
