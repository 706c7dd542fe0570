"""Rules about several parameters together."""

from typing import Any
from urllib.parse import urlsplit

from kepo_core.errors import ParamError
from kepo_core.method.options import Range

#: The rewards of the paper's task (Appendix B), by the names that a gate reads them by, and their largest values.
REWARDS = {"": 1, "accuracy": 1, "format": 1, "total": 2}


def check_together(params: Any) -> None:
    """Raise `ParamError`, a sentence that says what to change, for ``Params`` that contradict each other."""
    for name in ("gate_reward", "exploration_reward"):
        if getattr(params, name) not in REWARDS:
            raise ParamError(f"{name} must be one of {', '.join(filter(None, REWARDS))}, got {getattr(params, name)!r}")
    largest = REWARDS[params.gate_reward]
    if not 0 <= params.tau <= largest:
        raise ParamError(
            f"tau must lie between 0 and {largest}, the largest {params.gate_reward or 'accuracy'} reward "
            f"(gate_reward), got {params.tau:g}"
        )
    if params.thinking and (params.method == "sft" or (params.method == "gkd" and params.gkd_lambda < 1)):
        raise ParamError(
            f"method {params.method} learns from the right answers (gkd with gkd_lambda below 1), which have no "
            "reasoning: set thinking to False"
        )
    if params.method == "kepo" and params.explore and not params.thinking:
        raise ParamError(
            "explore needs thinking: the paper has no hint-aware prompt without it; set explore to False or "
            "thinking to True"
        )
    Range(2).check("group_size", params.group_size)
    params.check_group(params.group_size, "group_size")
    if params.prompts_per_step % (params.prompts_per_device * params.processes):
        raise ParamError(
            f"prompts_per_step must be a multiple of prompts_per_device × processes ({params.prompts_per_device} × "
            f"{params.processes}), got {params.prompts_per_step}"
        )
    if params.method != "none" and params.train_items < params.prompts_per_step:
        raise ParamError(
            f"train_items must be at least prompts_per_step ({params.prompts_per_step}), enough for one step, got "
            f"{params.train_items}"
        )
    _check_trl(params)
    if params.eval_samples > 1 and not params.eval_temperature:
        raise ParamError(
            f"eval_samples is {params.eval_samples} but eval_temperature is 0, and greedy answers are all the same: "
            "set eval_temperature, for example to 1"
        )
    _check_served(params)


def _check_trl(params: Any) -> None:
    """Raise `ParamError` for fields of TRL's that contradict the study's parameters."""
    given = params.trl
    if given.get("use_vllm") and params.method == "gkd":
        raise ParamError("use_vllm samples rollouts for method kepo, not for gkd: set use_vllm to False")
    if given.get("use_vllm") and params.method == "sft" and params.curve_steps:
        raise ParamError("use_vllm has no engine while method sft trains: set curve_steps to 0, or use_vllm to False")
    if given.get("vllm_mode", "colocate") not in ("colocate", "server"):
        raise ParamError(f"vllm_mode must be one of colocate, server, got {given['vllm_mode']!r}")
    if (share := given.get("vllm_gpu_memory_utilization")) is not None:
        Range(0, 1, above=True).check("vllm_gpu_memory_utilization", share)
    mode, address = given.get("vllm_mode", "colocate"), given.get("vllm_server_base_url")
    if given.get("use_vllm") and bool(address) != (mode == "server"):
        raise ParamError(
            f"vllm_server_base_url must be set for vllm_mode server and for no other, got {address!r} with {mode}"
        )
    for name, least in (("max_completion_length", 1), ("save_steps", 0), ("vllm_max_model_length", 1)):
        Range(least).check(name, given[name])
    if given["max_steps"] != -1:
        Range(1).check("max_steps", given["max_steps"])


def _check_served(params: Any) -> None:
    """Raise `ParamError` unless the ``Params`` name a teacher server and its top-k, or neither.

    A server's key comes from the environment, since parameters are written into run folders.
    """
    if bool(params.teacher_url) != bool(params.teacher_top_k):
        raise ParamError(
            f"teacher_url is {params.teacher_url!r} and teacher_top_k {params.teacher_top_k}, expected both for a "
            "served teacher, or neither; vLLM returns at most 20 log-probabilities a token, or its --max-logprobs"
        )
    if not params.teacher_url:
        return
    address = urlsplit(params.teacher_url)
    if address.username is not None or address.password is not None:
        raise ParamError("teacher_url must hold no name or password: the server's key comes from $KEPO_TEACHER_KEY")
    if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
        raise ParamError(f"teacher_url must be like http://HOST:8000/v1, got {params.teacher_url!r}")
    if params.method == "gkd":
        raise ParamError("method gkd needs the teacher's whole distribution: leave teacher_url empty")
    if params.teacher_quantization != "none":
        raise ParamError(
            f"teacher_quantization is {params.teacher_quantization!r}, but with teacher_url the server decides how it "
            "loads the teacher: set teacher_quantization to none"
        )
    if params.method == "kepo" and params.distill and params.distill_temperature != 1:
        raise ParamError(
            f"distill_temperature must be 1 if teacher_url is set, got {params.distill_temperature:g}: it divides all "
            "logits, and a served teacher returns only top-k log-probabilities"
        )
