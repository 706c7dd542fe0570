"""What the parameters of a served teacher have to fulfil together."""

from typing import Any
from urllib.parse import urlsplit

from kepo_core.params_io import ParamError

#: Where the server is and how it is asked, which changes no result: it may move before a run is resumed.
SERVER = ("teacher_url", "teacher_timeout", "teacher_retries", "teacher_concurrency")


def check_served(params: Any) -> None:
    """Raise `ParamError` unless the ``Params`` name a server and what is asked of it, or neither.

    A server's key comes from the environment: what stands in a parameter is written into run folders.
    """
    if bool(params.teacher_url) != bool(params.teacher_top_k):
        raise ParamError(
            f"teacher_url is {params.teacher_url!r} and teacher_top_k {params.teacher_top_k}, expected both for a "
            "served teacher, or neither; vLLM tells the 20 likeliest tokens, or as many as its --max-logprobs says"
        )
    if not params.teacher_url:
        return
    address = urlsplit(params.teacher_url)
    if address.username is not None or address.password is not None:
        raise ParamError("teacher_url must hold no name or password: the server's key comes from $KEPO_TEACHER_KEY")
    if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
        raise ParamError(f"teacher_url must be like http://HOST:8000/v1, got {params.teacher_url!r}")
    if params.method == "gkd":
        raise ParamError("method gkd needs the whole of the teacher's distribution: leave teacher_url empty")
    if params.method == "kepo" and params.distill and params.distill_temperature != 1:
        raise ParamError(
            f"distill_temperature must be 1 where teacher_url is set, got {params.distill_temperature:g}: it divides "
            "all logits, and a served teacher tells the log-probabilities of its likeliest tokens"
        )
