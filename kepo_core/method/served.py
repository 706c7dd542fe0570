"""π_T on another machine: hints and top-k log-probabilities, over the OpenAI-compatible API of vLLM.

A hint is an ordinary chat completion with the picture. Log-probabilities are vLLM's ``prompt_logprobs`` of a chat
whose last message, the student's completion, is left open (``continue_final_message``). The server gets text and
tokenizes it again; the tokens that it used (``return_token_ids``) are compared with the student's own, one by one,
prompt and picture included. The student never learns from other tokens.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.generation.vllm_client import to_openai_messages

from kepo_core.files import write_atomically
from kepo_core.method.chat_client import ChatClient, TeacherServerError
from kepo_core.method.task import Prompt, markup_of, with_images
from kepo_core.method.teacher import parse_hint, tokenizer_of

#: How far a log-probability may exceed 0, and the total probability 1: servers compute in bfloat16.
TOLERANCE = 1e-3
#: Minimum probability of the rest, which keeps its log finite.
_LEAST_REST = 1e-8


@dataclass(frozen=True)
class Completion:
    """A completion to score: messages with their pictures, and the tokens that the student read and wrote.

    ``prompt_ids`` include every image token; ``name`` identifies it in error messages; ``template`` holds further
    arguments of the chat template.
    """

    name: str
    messages: list[dict[str, Any]]
    prompt_ids: list[int]
    completion_ids: list[int]
    template: Mapping[str, Any] = field(default_factory=dict)


class TokenScores(NamedTuple):
    """What the teacher thinks of t tokens: its top-k ids (t, k), log-probabilities (t, k+1), the tokens' own (t,).

    The last column of ``log_probs`` is the log-probability of all other tokens; it is missing if k is the student's
    vocabulary size.
    """

    ids: Tensor
    log_probs: Tensor
    own: Tensor


class ServedTeacher:
    """π_T on another machine, served by vLLM. Use it instead of a `Teacher`. Prompts must be chats.

    Args:
        client: base address of the API, for example ``http://HOST:8000/v1``, or a `ChatClient`.
        model: the name under which the server offers the teacher.
        processor: the student's processor or tokenizer; its vocabulary and chat template must be the teacher's, which
            `score` checks.
        top_k: number of log-probabilities per token requested from the server; vLLM returns up to 20 by default
            (``--max-logprobs`` raises that).
        hints: folder in which hints are kept from run to run; None: hints are requested again.

    Example (no request is sent before training):

    ```python
    >>> from kepo_core import ServedTeacher
    >>> from kepo_core.testbed.embedded import build_processor
    >>> teacher = ServedTeacher("http://localhost:8000/v1", "Qwen/Qwen3-VL-32B-Instruct", build_processor(), top_k=20)
    >>> teacher.top_k
    20

    ```
    """

    #: Each process may call it by itself.
    collective = False

    def __init__(
        self, client: ChatClient | str, model: str, processor: Any, *, top_k: int = 20, hints: Path | None = None
    ) -> None:
        self.processor, self.top_k = processor, top_k
        self._client = ChatClient(client) if isinstance(client, str) else client
        self._model, self._hints = model, hints
        self._tokenizer = tokenizer_of(processor)
        self._markup = markup_of(self._tokenizer)
        self._vocabulary = math.inf  # `check_fits` sets it from the student

    def check_fits(self, student: Any, processor: Any, inputs: Collection[str] = ()) -> None:
        """Raise ``ValueError`` if ``top_k`` exceeds the student's vocabulary; `score` compares tokens, one by one."""
        self._vocabulary = student.get_output_embeddings().weight.shape[0]
        if self.top_k > self._vocabulary:
            raise ValueError(f"top_k is {self.top_k}, expected at most the student's {self._vocabulary} tokens")

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise ``ValueError`` for a prompt that is not a chat."""
        chat(prompt)

    def prepare(self, accelerator: Any, *, deepspeed: bool = False, fsdp: bool = False) -> None:
        """Do nothing: the server holds the model."""

    # Hints ------------------------------------------------------------------------------------------------------

    def write_hints(
        self, prompts: Sequence[Prompt], *, max_tokens: int, seed: int = 0, template: Mapping[str, Any] | None = None
    ) -> list[str | None]:
        """Greedily decoded hints (Eq. 8), one for each prompt; None where no hint can be read.

        With greedy decoding a hint depends only on model, prompt, picture, maximum length and template: the server
        writes it once for all epochs, resumed runs, seeds and rows of a study. An answer without a hint is requested
        again next time, because the server may have been fixed.

        Args:
            prompts: messages whose image parts hold their pictures.
            max_tokens: maximum length in tokens, tags included.
            seed: ignored, because decoding is greedy.
            template: further arguments of the chat template.

        Raises:
            TeacherServerError: as in `ChatClient.ask_all`.
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
        """The teacher's answer to one prompt, with or without a hint; it is not kept."""
        (text,) = self.answer([prompt], max_tokens=max_tokens)
        return text

    def answer(
        self, prompts: Sequence[Prompt], *, max_tokens: int, template: Mapping[str, Any] | None = None
    ) -> list[str]:
        """The teacher's own greedy answers, one for each prompt; nothing is kept. As `Teacher.answer`.

        Raises:
            TeacherServerError: as in `ChatClient.ask_all`.
        """
        bodies = [self._body(chat(prompt), max_tokens, template or {}) for prompt in prompts]
        return self._client.ask_all(bodies, lambda _, answer: self._said(answer))

    def _body(
        self, messages: list[dict[str, Any]], max_tokens: int, template: Mapping[str, Any], **vllm: Any
    ) -> dict[str, Any]:
        """A greedy request, with everything that its answer depends on; ``vllm``: arguments that OpenAI's API lacks."""
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
                f"the teacher at {self._client.url} sent an answer without a message, expected a chat completion"
            ) from error

    def _kept(self, key: str) -> str | None:
        if self._hints is None or not (path := self._hints / f"{key}.txt").is_file():
            return None
        return parse_hint(path.read_text(encoding="utf-8", errors="replace"), self._markup)

    def _keep(self, key: str, text: str) -> None:
        if self._hints is not None:
            self._hints.mkdir(parents=True, exist_ok=True)
            write_atomically(self._hints / f"{key}.txt", text)  # several processes may request the same hint

    # Log-probabilities ------------------------------------------------------------------------------------------

    def score_batch(
        self,
        rows: Sequence[Mapping[str, Any]],
        inputs: Mapping[str, Any],
        mask_BT: Tensor,
        template: Mapping[str, Any] | None = None,
    ) -> tuple[list[TokenScores], Tensor]:
        """Score the guided rows of a GRPOTrainer batch.

        Args:
            rows: B dataset rows with ``prompt`` and their pictures.
            inputs: ``prompt_ids``, ``prompt_mask`` and ``completion_ids``, B rows each.
            mask_BT: 1 on the tokens to be guided.
            template: further arguments of the chat template.

        Returns:
            B scores (on the CPU; of no tokens for rows that were not scored), and (B,) booleans: rows with tokens in
            the mask that cannot be scored, because their text would be tokenized differently.
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
        none = TokenScores(torch.empty(0, self.top_k, dtype=torch.long), torch.empty(0, self.top_k + 1), torch.empty(0))
        left_out = [row in wanted and row not in asked for row in range(len(rows))]
        return [scored.get(row, none) for row in range(len(rows))], torch.tensor(left_out, device=mask_BT.device)

    def is_canonical(self, one: Completion) -> bool:
        """Whether tokenizing the text of prompt and completion gives exactly the tokens that the student wrote.

        Sampling can build a word from other tokens than the tokenizer uses. A server that takes text cannot score
        those.
        """
        tokenizer = self._tokenizer
        arguments = {"tokenize": False, "add_generation_prompt": True, **one.template}
        prompt = self.processor.apply_chat_template(one.messages, **arguments)
        both = tokenizer(prompt + self._text(one), add_special_tokens=False)["input_ids"]
        return bool(both == tokenizer(prompt, add_special_tokens=False)["input_ids"] + one.completion_ids)

    def _text(self, one: Completion) -> str:
        return str(self._tokenizer.decode(one.completion_ids, skip_special_tokens=False))

    def score(self, completions: Sequence[Completion]) -> list[TokenScores]:
        """The teacher's top-k tokens at each token of each completion, and how likely the token itself is.

        Raises:
            TeacherServerError: tokens are not the student's, log-probabilities are missing or impossible, or as in
                `ChatClient.ask_all`.
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

    def _read(self, one: Completion, answer: Any) -> TokenScores:
        told: Any = getattr(answer, "prompt_logprobs", None)
        self._compare(one, getattr(answer, "prompt_token_ids", None), told)
        start = len(one.prompt_ids)
        places = [self._values(one, place, told[start + place]) for place in range(len(one.completion_ids))]
        own = [values[token] for values, token in zip(places, one.completion_ids, strict=True)]
        likeliest = [sorted(values.items(), key=lambda item: (-item[1], item[0]))[: self.top_k] for values in places]
        ids = torch.tensor([[token for token, _ in tokens] for tokens in likeliest])
        log_probs = torch.tensor([[value for _, value in tokens] for tokens in likeliest], dtype=torch.float64)
        if self.top_k != self._vocabulary:
            rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=_LEAST_REST).log()
            log_probs = torch.cat([log_probs, rest], -1)
        return TokenScores(ids, log_probs.float(), torch.tensor(own))

    def _compare(self, one: Completion, theirs: Any, told: Any) -> None:
        """Raise unless the server's tokens equal prompt and completion, and each has log-probabilities."""
        where = f"the teacher at {self._client.url}, completion {one.name}"
        if not isinstance(theirs, list) or not isinstance(told, list) or len(told) != len(theirs):
            raise TeacherServerError(
                f"{where}: no prompt_token_ids with one prompt_logprobs each, expected vLLM 0.10.2 or later"
            )
        ours = one.prompt_ids + one.completion_ids
        if theirs != ours:
            place = next(place for place, (a, b) in enumerate(zip_longest(theirs, ours)) if a != b)
            there, here = (self._tokenizer.convert_ids_to_tokens(ids[place : place + 1]) for ids in (theirs, ours))
            raise TeacherServerError(
                f"{where}: token {place} is {there} on the server but {here} here (the prompt has "
                f"{len(one.prompt_ids)} tokens), of {len(theirs)} and {len(ours)}, expected the same: raise "
                "--max-model-len, or serve a teacher with the student's tokenizer, chat template and image size"
            )

    def _values(self, one: Completion, place: int, told: Any) -> dict[int, float]:
        """The log-probabilities at one token of a completion by token: its own, and at least the top k."""
        where = f"the teacher at {self._client.url}, completion {one.name}, token {place}"
        own = one.completion_ids[place]
        try:
            values = {int(token): float(entry["logprob"]) for token, entry in told.items()}
        except (AttributeError, KeyError, TypeError, ValueError):  # missing, or null instead of NaN
            values = {}
        if len(values) < self.top_k or own not in values or not 0 <= min(values) <= max(values) < self._vocabulary:
            raise TeacherServerError(
                f"{where}: {len(values)} log-probabilities came back, expected those of the top {self.top_k} "
                f"tokens and of the student's own, {own}, all ids below {self._vocabulary}"
            )
        possible = all(-math.inf < value <= TOLERANCE for value in values.values())
        if not possible or math.fsum(map(math.exp, values.values())) > 1 + TOLERANCE:
            raise TeacherServerError(
                f"{where}: log-probabilities from {min(values.values())} to {max(values.values())} came back, expected "
                "finite values whose probabilities sum to at most 1"
            )
        return values


def chat(prompt: Prompt) -> list[dict[str, Any]]:
    """``prompt``, if it is a chat, which the server renders by its chat template; ``ValueError`` if it is text."""
    if isinstance(prompt, str):
        raise ValueError("a prompt is text, expected chat messages: a served teacher takes chats only")
    return prompt
