"""Shared fixtures: the embedded processor, untrained models of the smallest size, and a browser.

Every test file loads this one, so what takes seconds to import is imported by the fixture that needs it.
"""

import gc
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration

    from kepo_core.method.processor import ImageOnlyQwenProcessor

# A busy machine takes longer than any deadline for an example.
hypothesis.settings.register_profile("kepo", deadline=None)
hypothesis.settings.load_profile("kepo")
# For `make mutants`: a mutant is judged by the same few examples each time.
hypothesis.settings.register_profile("mutants", deadline=None, derandomize=True, max_examples=30)


def pytest_collection_finish() -> None:
    """Take what has been imported out of the garbage collector: every training collects, a third of a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def processor() -> "ImageOnlyQwenProcessor":
    from kepo_core.testbed.embedded import build_processor

    return build_processor()


@pytest.fixture(scope="session")
def tiny_model() -> "Callable[..., Qwen3VLForConditionalGeneration]":
    """``tiny_model(seed=0)`` builds a new random Qwen3-VL of the test size."""
    from kepo_core.testbed.embedded import build_model

    def build(seed: int = 0) -> "Qwen3VLForConditionalGeneration":
        return build_model("test", seed)

    return build


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[Path], tuple[str, list[str]]]:
    """``opened(page)``: the page's elements after its scripts have run, and what its console says, from Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")

    def look(page: Path) -> tuple[str, list[str]]:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command = [chromium, *flags, "--enable-logging=stderr", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return look
