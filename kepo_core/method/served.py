"""π_T on other machines: hints and its likeliest next tokens, over the OpenAI-compatible API of vLLM.

A hint is an ordinary chat completion with the picture. Log-probabilities are vLLM's ``prompt_logprobs`` of a chat
whose last message, the student's completion, is left open (``continue_final_message``). As a chat goes out as text
and is cut into tokens once more by the server, the tokens that come back (``return_token_ids``) are compared with the
student's own, prompt and picture included, one by one: nothing is learnt from others.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl.generation.vllm_client import to_openai_messages

from kepo_core.files import write_atomically
from kepo_core.method.chat_client import ChatClient, TeacherServerError
from kepo_core.method.task import Prompt, with_images
from kepo_core.method.teacher import markup_of, parse_hint, tokenizer_of

#: How far a log-probability may lie above 0, and their mass above 1: servers compute in bfloat16.
TOLERANCE = 1e-3
#: Floor for the tail mass, so that its log is finite.
_LEAST_REST = 1e-8


@dataclass(frozen=True)
class Completion:
    """What log-probabilities are asked for: messages with their pictures, and the tokens the student saw and wrote.

    ``prompt_ids`` hold every token of the pictures, too; ``name`` is what error messages call it, and ``template`` the
    further arguments of the chat template.
    """

    name: str
    messages: list[dict[str, Any]]
    prompt_ids: list[int]
    completion_ids: list[int]
    template: Mapping[str, Any] = field(default_factory=dict)


class ServedTeacher:
    """π_T on another machine: served by vLLM, with what the trainer asks of a `Teacher`. Prompts are chats.

    Args:
        client: where the API begins, like ``http://HOST:8000/v1``, or a `ChatClient` of one's own.
        model: the name under which it serves the teacher.
        processor: the student's processor or tokenizer; its vocabulary and chat template must be the teacher's, which
            `score` checks.
        top_k: how many of the likeliest next tokens are asked for; vLLM gives up to 20 unless it was started with
            ``--max-logprobs``.
        hints: the folder in which hints are kept from run to run; None: they are asked for again.

    Example (nothing is asked before training):

    ```python
    >>> from kepo_core import ServedTeacher
    >>> from kepo_core.testbed.embedded import build_processor
    >>> teacher = ServedTeacher("http://localhost:8000/v1", "Qwen/Qwen3-VL-32B-Instruct", build_processor(), top_k=20)
    >>> teacher.top_k
    20

    ```
    """

    #: No process waits for another one when it asks.
    collective = False

    def __init__(
        self, client: ChatClient | str, model: str, processor: Any, *, top_k: int = 20, hints: Path | None = None
    ) -> None:
        self.processor, self.top_k = processor, top_k
        self._client = ChatClient(client) if isinstance(client, str) else client
        self._model, self._hints = model, hints
        self._tokenizer = tokenizer_of(processor)
        self._markup = markup_of(self._tokenizer)
        self._vocabulary = math.inf  # known from the student

    def check_fits(self, student: Any, processor: Any, inputs: Collection[str] = ()) -> None:
        """Raise ``ValueError`` unless the student has ``top_k`` tokens; its tokens are compared at every answer."""
        self._vocabulary = student.get_output_embeddings().weight.shape[0]
        if self.top_k > self._vocabulary:
            raise ValueError(f"top_k is {self.top_k}, expected at most the student's {self._vocabulary} tokens")

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise ``ValueError`` for a prompt that is no chat."""
        chat(prompt)

    def prepare(self, accelerator: Any, *, deepspeed: bool = False, fsdp: bool = False) -> None:
        """Nothing: the model is elsewhere."""

    # Hints ------------------------------------------------------------------------------------------------------

    def write_hints(
        self, prompts: Sequence[Prompt], *, max_tokens: int, seed: int = 0, template: Mapping[str, Any] | None = None
    ) -> list[str | None]:
        """The likeliest hint for each prompt (greedy); None where none can be read.

        Greedy decoding makes a hint depend on nothing but model, prompt, picture, length and template. So the large
        teacher writes it once for all epochs, resumed runs, seeds and rows of a study. Where an answer has none, it is
        asked again, as the server may be put right.

        Args:
            prompts: messages whose image parts hold their pictures.
            max_tokens: the longest hint, tags included.
            seed: ignored, as decoding is greedy.
            template: further arguments of the chat template.

        Raises:
            TeacherServerError: as `ChatClient.ask_all` says.
        """
        bodies = [self._body(chat(prompt), max_tokens, template or {}) for prompt in prompts]
        keys = [hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() for body in bodies]
        hints = {key: self._kept(key) for key in keys}
        asked = {key: body for key, body in zip(keys, bodies, strict=True) if hints[key] is None}
        names = list(asked)

        def read(place: int, answer: Any) -> str | None:
            text = self._said(answer)
            self._keep(names[place], text)
            return parse_hint(text, self._markup)

        hints |= dict(zip(names, self._client.ask_all(list(asked.values()), read), strict=True))
        return [hints[key] for key in keys]

    def try_hint(self, prompt: Prompt, max_tokens: int) -> str:
        """What the teacher answers to one prompt, hint or not; nothing is kept."""
        bodies = [self._body(chat(prompt), max_tokens, {})]
        (text,) = self._client.ask_all(bodies, lambda _, answer: self._said(answer))
        return text

    def _body(
        self, messages: list[dict[str, Any]], max_tokens: int, template: Mapping[str, Any], **vllm: Any
    ) -> dict[str, Any]:
        """A greedy request, with everything that its answer depends on; ``vllm`` is what OpenAI's API does not have."""
        further = vllm | ({"chat_template_kwargs": dict(template)} if template else {})
        return {
            "model": self._model,
            "messages": to_openai_messages(messages),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "extra_body": further,
        }

    def _said(self, answer: Any) -> str:
        try:
            return str(answer.choices[0].message.content or "")  # null: it wrote nothing
        except (AttributeError, IndexError, TypeError) as error:
            raise TeacherServerError(
                f"the teacher at {self._client.url} answers without a message, expected a chat completion"
            ) from error

    def _kept(self, key: str) -> str | None:
        if self._hints is None or not (path := self._hints / f"{key}.txt").is_file():
            return None
        return parse_hint(path.read_text(encoding="utf-8", errors="replace"), self._markup)

    def _keep(self, key: str, text: str) -> None:
        if self._hints is not None:
            self._hints.mkdir(parents=True, exist_ok=True)
            write_atomically(self._hints / f"{key}.txt", text)  # several processes may ask for one hint

    # Log-probabilities ------------------------------------------------------------------------------------------

    def score_batch(
        self,
        rows: Sequence[Mapping[str, Any]],
        inputs: Mapping[str, Any],
        mask_BT: Tensor,
        template: Mapping[str, Any] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """What `top_k.gather_targets` takes, for the rows of a GRPOTrainer batch; nothing else is asked for.

        Args:
            rows: B dataset rows with ``prompt`` and their pictures.
            inputs: with ``prompt_ids``, ``prompt_mask`` and ``completion_ids``, B rows each.
            mask_BT: 1 on the tokens to be guided.
            template: further arguments of the chat template.

        Returns:
            B tensors of ids and B of log-probabilities (on the CPU; of no tokens where nothing was asked for), and
            (B,) booleans: those with tokens in the mask that cannot be asked for, as their text would be cut into
            other tokens.
        """
        wanted = mask_BT.any(1).nonzero().flatten().tolist()
        asked = {}
        for row in wanted:
            one = Completion(
                name=str(rows[row].get("id", row)),
                messages=chat(with_images(rows[row]["prompt"], rows[row])),
                prompt_ids=inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()].tolist(),
                completion_ids=inputs["completion_ids"][row][mask_BT[row].bool()].tolist(),
                template=template or {},
            )
            if self.is_canonical(one):
                asked[row] = one
        scored = dict(zip(asked, self.score(list(asked.values())), strict=True))
        none = torch.empty(0, self.top_k, dtype=torch.long), torch.empty(0, self.top_k + 1)
        ids, log_probs = zip(*(scored.get(row, none) for row in range(len(rows))), strict=True)
        left_out = [row in wanted and row not in asked for row in range(len(rows))]
        return list(ids), list(log_probs), torch.tensor(left_out, device=mask_BT.device)

    def is_canonical(self, one: Completion) -> bool:
        """Whether the text of prompt and completion is cut into the very tokens that the student wrote.

        Sampling can put a word together from other pieces than a tokenizer would; a server that takes text cannot
        be asked about those.
        """
        tokenizer = self._tokenizer
        arguments = {"tokenize": False, "add_generation_prompt": True, **one.template}
        prompt = self.processor.apply_chat_template(one.messages, **arguments)
        both = tokenizer(prompt + self._text(one), add_special_tokens=False)["input_ids"]
        return bool(both == tokenizer(prompt, add_special_tokens=False)["input_ids"] + one.completion_ids)

    def _text(self, one: Completion) -> str:
        return str(self._tokenizer.decode(one.completion_ids, skip_special_tokens=False))

    def score(self, completions: Sequence[Completion]) -> list[tuple[Tensor, Tensor]]:
        """The teacher's likeliest tokens at each place of each completion: ids (t, k), log-probabilities (t, k+1).

        The last column is the mass of all others; it is missing where k is the student's whole vocabulary.

        Raises:
            TeacherServerError: tokens are not the student's, log-probabilities are missing or impossible, or as
                `ChatClient.ask_all` says.
        """
        bodies = [self._score_body(one) for one in completions]
        return self._client.ask_all(bodies, lambda index, answer: self._read(completions[index], answer))

    def _score_body(self, one: Completion) -> dict[str, Any]:
        return self._body(
            [*one.messages, {"role": "assistant", "content": self._text(one)}],
            1,
            one.template,
            add_generation_prompt=False,
            continue_final_message=True,
            prompt_logprobs=self.top_k,
            return_token_ids=True,
        )

    def _read(self, one: Completion, answer: Any) -> tuple[Tensor, Tensor]:
        told: Any = getattr(answer, "prompt_logprobs", None)
        self._compare(one, getattr(answer, "prompt_token_ids", None), told)
        start = len(one.prompt_ids)
        places = [self._likeliest(one, place, told[start + place]) for place in range(len(one.completion_ids))]
        ids = torch.tensor([[token for token, _ in tokens] for tokens in places])
        log_probs = torch.tensor([[value for _, value in tokens] for tokens in places], dtype=torch.float64)
        if self.top_k != self._vocabulary:
            rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=_LEAST_REST).log()
            log_probs = torch.cat([log_probs, rest], -1)
        return ids, log_probs.float()

    def _compare(self, one: Completion, theirs: Any, told: Any) -> None:
        """Raise unless the server's tokens are prompt and completion, each with its log-probabilities."""
        where = f"the teacher at {self._client.url}, completion {one.name}"
        if not isinstance(theirs, list) or not isinstance(told, list) or len(told) != len(theirs):
            raise TeacherServerError(
                f"{where}: no prompt_token_ids with as many prompt_logprobs, expected a vLLM of 0.10.2 or later"
            )
        ours = one.prompt_ids + one.completion_ids
        if theirs != ours:
            place = next(place for place, (a, b) in enumerate(zip_longest(theirs, ours)) if a != b)
            there, here = (self._tokenizer.convert_ids_to_tokens(ids[place : place + 1]) for ids in (theirs, ours))
            raise TeacherServerError(
                f"{where}: token {place} is {there} there and {here} here (the prompt has {len(one.prompt_ids)}), of "
                f"{len(theirs)} and {len(ours)}, expected the same: a context too short (--max-model-len), or another "
                "tokenizer, chat template or image size"
            )

    def _likeliest(self, one: Completion, place: int, told: Any) -> list[tuple[int, float]]:
        """The k likeliest tokens at one place of a completion, with their log-probabilities."""
        where = f"the teacher at {self._client.url}, completion {one.name}, token {place}"
        own = one.completion_ids[place]
        try:
            values = {int(token): float(entry["logprob"]) for token, entry in told.items()}
        except (AttributeError, KeyError, TypeError, ValueError):  # none at all, or null in place of NaN
            values = {}
        if len(values) < self.top_k or own not in values or not 0 <= min(values) <= max(values) < self._vocabulary:
            raise TeacherServerError(
                f"{where}: {len(values)} log-probabilities came back, expected those of the {self.top_k} likeliest "
                f"tokens and of the student's own, {own}, all below {self._vocabulary}"
            )
        possible = all(-math.inf < value <= TOLERANCE for value in values.values())
        if not possible or math.fsum(map(math.exp, values.values())) > 1 + TOLERANCE:
            raise TeacherServerError(
                f"{where}: log-probabilities from {min(values.values())} to {max(values.values())} came back, expected "
                "finite ones whose probabilities sum to at most 1"
            )
        return sorted(values.items(), key=lambda item: (-item[1], item[0]))[: self.top_k]


def chat(prompt: Prompt) -> list[dict[str, Any]]:
    """``prompt``, which must be a chat: the server cuts it into tokens by its chat template."""
    if isinstance(prompt, str):
        raise ValueError("a prompt is text, expected chat messages: a served teacher takes chats only")
    return prompt
