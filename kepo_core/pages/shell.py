"""Fills the pages' templates. Values are escaped unless the template marks them ``safe``."""

import base64
import hashlib
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def _sha256(text: str) -> str:
    """The hash by which a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


_TEMPLATES = Environment(
    loader=PackageLoader("kepo_core.pages"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["sha256"] = _sha256


def render(template: str, **values: Any) -> str:
    """The file ``template`` of ``templates/`` with ``values`` in it."""
    return _TEMPLATES.get_template(template).render(values)


def source(template: str) -> str:
    """The text of ``template``, for nbconvert, which renders with its own environment."""
    assert _TEMPLATES.loader is not None
    return _TEMPLATES.loader.get_source(_TEMPLATES, template)[0]
