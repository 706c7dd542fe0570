"""Rollouts by vLLM from exactly the prompts that the trainer scores, with checks of both.

TRL sends vLLM the picture and token ids in which its placeholder is already repeated, once per image token. Colocated
vLLM expands the first placeholder again, and samples from a wrong prompt. Here it gets one placeholder per picture,
and the expanded prompt that it used is compared with the trainer's, token by token.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from requests import RequestException
from transformers import AutoConfig
from trl.generation import vllm_generation

#: vLLM versions that were run with this package (tests/real_vllm) or that TRL supports: from the first, below the last.
VERSIONS = ((0, 30), (0, 33))
#: Training stops if the mean |Δ log p| (nats) between vLLM and the trainer over a step's tokens exceeds this. With the
#: embedded models it is below 0.001, in 32 and in 16 bits, and at least 1.2 with corrupted prompts. Large models in
#: bfloat16 differ by some hundredths.
MOST_DIFFERENCE = 0.2

_RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Settings that change log-probabilities without a bound, and their neutral values.
_UNBOUNDED: dict[str, tuple[Any, ...]] = {
    "top_k": (0, -1),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "vllm_structured_outputs_regex": (None,),
    "generation_kwargs": (None, {}),
}


def most_difference(args: Any) -> float:
    """`MOST_DIFFERENCE` for the sampling that a ``GRPOConfig`` asks for.

    vLLM returns the log-probabilities of the distribution it samples from. A nucleus of mass ``top_p`` raises each by
    up to −log ``top_p``, which is added. The effect of ``top_k``, ``min_p``, penalties or a grammar has no bound: the
    limit is then infinite.
    """
    if any(getattr(args, name) not in neutral for name, neutral in _UNBOUNDED.items()):
        return math.inf
    return MOST_DIFFERENCE - math.log(args.top_p)


def one_placeholder_each(ids: Sequence[int], pictures: int, image_token: int, row: int) -> list[int]:
    """``ids`` with each picture's run of image tokens reduced to one.

    Raises:
        ValueError: the image tokens form several runs, but not one per picture.

    Example with image token 9 and two pictures:

    ```python
    >>> from kepo_core.method.vllm_rollouts import one_placeholder_each
    >>> one_placeholder_each([1, 9, 9, 9, 2, 9, 9, 3], 2, image_token=9, row=0)
    [1, 9, 2, 9, 3]
    >>> one_placeholder_each([1, 9, 9, 9, 9, 9, 3], 2, image_token=9, row=0)
    [1, 9, 9, 3]

    ```
    """
    runs = [(token, len(list(same))) for token, same in groupby(ids)]
    found = sum(token == image_token for token, _ in runs)
    if found not in (pictures, min(pictures, 1)):
        raise ValueError(
            f"prompt {row} has {pictures} pictures but {found} runs of image tokens ({image_token}), expected one run "
            "each: put text between the pictures, or set use_vllm to False"
        )
    each = pictures // found if found else 0
    return [token for token, count in runs for _ in range(each if token == image_token else count)]


@contextmanager
def making_engine(args: Any) -> Iterator[None]:
    """A context in which TRL creates its vLLM engine with the precision of the trainer, from a ``GRPOConfig``.

    Afterwards the environment variables that TRL sets for the engine are removed: later trainers would take them for a
    distributed run.
    """
    if not args.use_vllm:
        yield
        return
    before, made = {name: os.environ.get(name) for name in _RENDEZVOUS}, getattr(vllm_generation, "LLM", None)
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    if made:
        vllm_generation.LLM = partial(made, dtype=precision)
    try:
        yield
    finally:
        vllm_generation.LLM = made
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def check_used(sent: Sequence[Sequence[int]], used: Sequence[Sequence[int]]) -> None:
    """Raise ``ValueError`` unless vLLM sampled from the prompts that the trainer scores, naming row and token."""
    for row, (ours, theirs) in enumerate(zip(sent, used, strict=True)):
        if list(ours) == list(theirs):
            continue
        token = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        place = min(len(ours), len(theirs)) if token is None else token
        raise ValueError(
            f"vLLM sampled from another prompt than the trainer scores: row {row} differs from token {place} on "
            f"({len(theirs)} tokens in vLLM, {len(ours)} in the trainer). Its processor handles pictures differently "
            "from the student's: set use_vllm to False"
        )


class CheckedVLLM:
    """TRL's VLLMGeneration with correct prompts. All other attributes are those of the wrapped object."""

    def __init__(self, inner: Any, processor: Any) -> None:
        self._inner, self._image_token = inner, getattr(processor, "image_token_id", None)
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._most = inner.max_model_length  # maximum tokens of a prompt and its completion
        self._place = inner._place_features
        inner._place_features = self._place_features
        if self._image_token is not None:  # as in transformers' generation: a generated one would lack its picture
            inner.generation_kwargs = {"logit_bias": {self._image_token: -100.0}, **inner.generation_kwargs}
        if inner.mode == "server" and inner.accelerator.is_main_process:
            _name_tokens(inner.vllm_client)
            with self._in_our_words():
                self._check_server()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    @contextmanager
    def sampling(self, temperature: float, max_tokens: int, stop_tokens: Sequence[int]) -> Iterator[None]:
        """A context for evaluation: sampling without truncation or penalties, greedy at ``temperature`` 0."""
        inner, bias = self._inner, self._inner.generation_kwargs.get("logit_bias")
        plain = {
            "temperature": temperature,
            "max_completion_length": max_tokens,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": None,
            "repetition_penalty": 1.0,
            "structured_outputs_regex": None,
            "generation_kwargs": {"stop_token_ids": list(stop_tokens), "logit_bias": bias},
        }
        own = {name: getattr(inner, name) for name in plain}
        vars(inner).update(plain)
        try:
            yield
        finally:
            vars(inner).update(own)

    def sync_weights(self) -> None:
        """Send the student's weights to vLLM.

        Raises:
            ConnectionError: the server does not answer.
            ValueError: vLLM has packed its weights for this CPU and takes no new ones.
        """
        try:
            with self._in_our_words():
                self._inner.sync_weights()
        except AttributeError as error:
            if torch.cuda.is_available():
                raise
            raise ValueError(
                "vLLM has packed its weights for this CPU and takes no new ones: train on a GPU, set use_vllm to "
                "False, or build the environment with make test-vllm"
            ) from error

    def generate(
        self,
        prompts: list[list[int]],
        images: list[list[Any] | None] | None,
        num_generations: int,
        profiler: Any = None,
    ) -> Any:
        """As VLLMGeneration.generate; the image placeholders in ``prompts`` are expanded.

        Raises:
            ValueError: vLLM used other prompts, or a prompt leaves no room for a completion.
            ConnectionError: the server does not answer.
        """
        self._check_room(prompts)
        sent = prompts
        # For TRL, no pictures are None: it reads the first entry of any list.
        images = None if images is None else [pictures or None for pictures in images]
        if self._inner.mode == "colocate" and images is not None:
            assert self._image_token is not None
            sent = [
                one_placeholder_each(ids, len(pictures or ()), self._image_token, row)
                for row, (ids, pictures) in enumerate(zip(prompts, images, strict=True))
            ]
        with self._in_our_words():
            used, *drawn = self._inner.generate(sent, images, num_generations, profiler)
        check_used(prompts, used)
        return used, *drawn

    def _check_room(self, prompts: Sequence[Sequence[int]]) -> None:
        most, wanted = self._most, self._inner.max_completion_length
        for row, ids in enumerate(prompts):
            if most is not None and len(ids) + wanted > most:
                raise ValueError(
                    f"prompt {row} has {len(ids)} tokens, which leaves no room for a completion of {wanted} in vLLM's "
                    f"context of {most}: set vllm_max_model_length (a server's --max-model-len) to "
                    f"{len(ids) + wanted} or more"
                )

    def _place_features(self, features: Any, prompt_ids: list[int]) -> Any:
        """TRL's positions of a server's pictures in the prompt; ``ValueError`` if their sizes differ there and here."""
        placed = self._place(features, prompt_ids)
        if placed is not None:
            theirs = [each.get("length") for each in features["mm_placeholders"]["image"]]
            ours = [each["length"] for each in placed["mm_placeholders"]["image"]]
            if theirs != ours:
                raise ValueError(
                    f"the vLLM server makes {theirs} tokens from a prompt's pictures, the trainer {ours}: serve the "
                    "student with the processor that it is trained with"
                )
        return placed

    def _check_server(self) -> None:
        """Raise ``ValueError`` unless the server tokenizes as the student does; store its context length."""
        client, text = self._inner.vllm_client, "A) 12.5 mm <think>höher</think> 是"
        self._most = client.session.get(f"{client.base_url}/v1/models").json()["data"][0].get("max_model_len")
        asked = {"model": client.model, "prompt": text, "add_special_tokens": False}
        answer = client.session.post(f"{client.base_url}/tokenize", json=asked)
        if answer.status_code != 200:
            raise ValueError(f"the vLLM server at {client.base_url} does not tokenize: {answer.text[:300]}")
        if answer.json()["tokens"] != self._tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ValueError(
                f"the vLLM server at {client.base_url} serves {client.model} with another tokenizer than the "
                "student's: serve the model that is trained"
            )
        self._check_size(client.get_server_info()["model_config"]["model"])

    def _check_size(self, served: str) -> None:
        """Raise ``ValueError`` if the sizes of the model ``served``, if known here, differ from the student's."""
        try:
            theirs = AutoConfig.from_pretrained(served).get_text_config()
        except (OSError, ValueError):  # only on the server's disk
            return
        ours = self._inner.model.config.get_text_config()
        for size in ("hidden_size", "num_hidden_layers", "intermediate_size"):
            if getattr(theirs, size, None) != getattr(ours, size, None):
                raise ValueError(
                    f"the vLLM server at {self._inner.vllm_client.base_url} serves {served}, whose {size} is "
                    f"{getattr(theirs, size, None)}, the student's {getattr(ours, size, None)}: serve the student"
                )

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        """A context that turns errors of TRL's client into one sentence that names the server."""
        try:
            yield
        except RequestException as error:
            raise ConnectionError(
                f"the vLLM server at {self._inner.server_base_url} does not answer ({type(error).__name__}): restart it"
            ) from error
        except Exception as error:  # TRL raises bare Exceptions
            if not str(error).startswith("Request failed"):
                raise
            raise ValueError(
                f"the vLLM server at {self._inner.server_base_url} rejects the request, expected a server of the "
                f"student: {str(error)[:300]}"
            ) from error


def _name_tokens(client: Any) -> None:
    """Let TRL's client read the log-probabilities of vLLM 0.32, which has token ids in another field."""
    post = client._post

    def named(url: str, **kwargs: Any) -> Any:
        answer = post(url, **kwargs)
        for choice in answer.get("choices", ()):
            for token in (choice.get("logprobs") or {}).get("content") or ():
                for entry in (token, *token.get("top_logprobs", ())):
                    if "token_id" in entry:
                        entry.setdefault("token", f"token_id:{entry['token_id']}")
        return answer

    client._post = named
