"""vLLM's engine and server as far as TRL talks to them, backed by transformers; everything above them is TRL's own.

`FakeVLLM` is TRL's VLLMGeneration over these engines: its syncing of weights, gathering of prompts over processes and
slicing of answers are the real ones. The engine begins with weights of its own, so that a draw before they are synced
shows; it reads pictures by itself, from the prompt's ids and PIL images, as vLLM does.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.trainer import grpo_trainer

#: (prompt text, its images) → the completion's ids, instead of what the model would say.
Says = Callable[[str, list[Any]], list[int]]


class Engine:
    """A model of its own that answers prompts of token ids with pictures, with the log-probability of each token."""

    def __init__(self, model: Any, processor: Any, says: Says | None) -> None:
        torch.manual_seed(99)
        self.model, self.processor, self.says = type(model)(model.config).eval(), processor, says
        self.asked: list[str] = []
        self.sampling: list[dict[str, Any]] = []
        self.synced = 0

    def load_weights(self, weights: Any) -> None:
        self.model.load_state_dict(dict(weights), strict=False)

    def answers(self, prompts: list[list[int]], images: list[list[Any]], n: int, sampling: dict[str, Any]) -> list[Any]:
        """n (ids, log-probabilities) per prompt, prompt after prompt."""
        self.sampling.append(sampling)
        return [self._answer(ids, pictures, sampling) for ids, pictures in zip(prompts, images, strict=True)
                for _ in range(n)]  # fmt: skip

    def _answer(self, ids: list[int], pictures: list[Any], sampling: dict[str, Any]) -> Any:
        text = self.processor.tokenizer.decode(ids)
        self.asked.append(text)
        if self.says is not None:
            said = self.says(text, pictures)
            return said, [float("nan")] * len(said)
        tokens, read = torch.tensor([ids]), self.processor.image_processor(pictures, return_tensors="pt")
        image = tokens == self.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        out = self.model.generate(
            input_ids=tokens,
            mm_token_type_ids=image.int(),
            **read,
            do_sample=True,
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            top_k=sampling["top_k"],
            max_new_tokens=sampling["max_tokens"],
            return_dict_in_generate=True,
            output_scores=True,
        )
        said = out.sequences[0, len(ids) :].tolist()
        logps = [s[0].log_softmax(-1)[t].item() for s, t in zip(out.scores, said, strict=True)]
        return said, logps


class FakeLLM:
    """vllm.LLM, as colocated: ``generate``, and the way down to its weights."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=engine))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=runner))

    def reset_prefix_cache(self) -> None:
        self.engine.synced += 1

    def generate(self, prompts: list[dict[str, Any]], *, sampling_params: Any, use_tqdm: bool) -> list[Any]:
        """Requests' outputs, with vLLM's attributes."""
        given = vars(sampling_params)
        assert given["n"] == 1 and given["logprobs"] == 0
        outputs = []
        for prompt in prompts:
            image = prompt["multi_modal_data"]["image"]
            ((said, logps),) = self.engine.answers([prompt["prompt_token_ids"]], [[image]], 1, given)
            each = [{token: SimpleNamespace(rank=1, logprob=logp)} for token, logp in zip(said, logps, strict=True)]
            output = SimpleNamespace(token_ids=said, logprobs=each)
            outputs.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[output]))
        return outputs


class FakeClient:
    """TRL's VLLMClient, without a server; a test keeps the signatures equal."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def get_server_info(self) -> dict:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata: Any, named_params: Any) -> None:
        self.engine.load_weights((name, value.detach().cpu()) for name, value in named_params)

    def reset_prefix_cache(self) -> None:
        self.engine.synced += 1

    def image_features(self, images: list[list | None], max_concurrent_requests: int = 64) -> list[dict | None]:
        return [{"pictures": each, "mm_placeholders": {"image": [{}]}} for each in images]

    def generate(
        self,
        prompts: Any,
        features: Any = None,
        n: int = 1,
        repetition_penalty: float = 1.0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_tokens: int = 16,
        logprobs: int | None = 0,
        structured_outputs_regex: str | None = None,
        generation_kwargs: dict | None = None,
    ) -> dict[str, list[list[int]]]:
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "max_tokens": max_tokens}
        answers = self.engine.answers(prompts, [each["pictures"] for each in features], n, sampling)
        return {
            "prompt_ids": prompts,
            "completion_ids": [said for said, _ in answers],
            "logprobs": [[[logp] for logp in logps] for _, logps in answers],
            "logprob_token_ids": [[[token] for token in said] for said, _ in answers],
        }


def same_signatures() -> bool:
    """Whether the fake client takes what TRL's takes, by name and default."""
    pairs = [(getattr(FakeClient, name), getattr(VLLMClient, name)) for name in vars(FakeClient) if name[0] != "_"]
    return all(
        [(p.name, p.default) for p in inspect.signature(ours).parameters.values()]
        == [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
        for ours, theirs in pairs
    )


def install(says: Says | None = None, put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let TRL's trainers have these engines; ``put`` sets an attribute (a test's own takes it back)."""

    class FakeVLLM(vllm_generation.VLLMGeneration):  # type: ignore[misc]
        def _init_vllm(self) -> None:
            self._llm_weights_sleeping = False
            self.engine = Engine(self.model, self.processing_class, says)
            if self.mode == "colocate":
                self.llm = FakeLLM(self.engine)
            elif self.accelerator.is_main_process:
                self.vllm_client = FakeClient(self.engine)

    put(grpo_trainer, "VLLMGeneration", FakeVLLM)
    put(vllm_generation, "SamplingParams", SimpleNamespace)
