"""Shared fixtures: the embedded processor and untrained models of the smallest size."""

from collections.abc import Callable

import pytest
from transformers import Qwen3VLForConditionalGeneration

from kepo_core.study.processor import ImageOnlyQwenProcessor
from kepo_core.testbed.embedded import build_model, build_processor


@pytest.fixture(scope="session")
def processor() -> ImageOnlyQwenProcessor:
    return build_processor()


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Qwen3VLForConditionalGeneration]:
    """``tiny_model(seed=0)`` builds a new random Qwen3-VL of the test size."""

    def build(seed: int = 0) -> Qwen3VLForConditionalGeneration:
        return build_model("test", seed)

    return build
