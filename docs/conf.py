"""How `make docs` builds the site: Sphinx, pages in Markdown (MyST), the API from docstrings."""

import sys
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))

project = "KEPO"
copyright = "the kepo-core developers, Apache-2.0"
html_title = "KEPO study package"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "docstrings"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]

# Markdown as GitHub reads it: a link to a heading works here and there.
myst_heading_anchors = 3
suppress_warnings: list[str] = []

# A name in single backticks is a reference where it is documented here, and plain code where it is not.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
add_module_names = False
# Shown once, where a class documents its constructor.
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# `make docs-links` asks these servers; `make docs` needs no network.
linkcheck_timeout = 20
linkcheck_ignore = [r"http://localhost.*", r"http://HOST.*"]


def setup(app: Sphinx) -> None:
    """Sphinx calls this. Pygments has no lexer for tables."""
    app.add_lexer("csv", TextLexer)
