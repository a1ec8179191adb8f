"""Sphinx's settings for the site; `make site` copies this folder and writes the pages beside it."""

import json
import re
from pathlib import Path

from docutils import nodes

_PROMPT = re.compile(r"\s*(>>>|\.\.\.)")
_TOLD = json.loads(Path(__file__).with_name("site.json").read_text(encoding="utf-8"))

project = "Compressible Dynamics"
author = "The Compressible Dynamics authors"
version = release = _TOLD["version"]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["extra", "static"]
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
default_role = "code"

# Notebooks are shown as they were executed. Widgets are shown by the picture that stands beside them in the same
# output: live they need a kernel, and their scripts come from elsewhere.
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autosummary_generate = False
napoleon_google_docstring = True

html_theme = "furo"
html_title = "Compressible Dynamics"
html_static_path = ["static"]
html_extra_path = ["extra"]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_copy_source = False
html_show_copyright = False
html_assets_policy = "always"  # cards hold formulas, too
html_theme_options = {"footer_icons": [], "top_of_page_buttons": []}
mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {
    "options": {"enableMenu": False},  # its menu would ask a CDN for more
    "svg": {"fontCache": "local"},
}
html_math_renderer = "tex" if _TOLD["no_mathjax"] else "mathjax"
if _TOLD["no_mathjax"]:
    html_theme_options["announcement"] = (
        "Formulas are shown as TeX, since MathJax could not be had when this was built."
    )


def _tex_inline(translator, node: nodes.math) -> None:
    translator.body.append(f'<code class="math">{translator.encode(node.astext())}</code>')
    raise nodes.SkipNode


def _tex_block(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<pre class="math">{translator.encode(node.astext())}</pre>')
    raise nodes.SkipNode


def _bars(app, what, name, each, options, lines: list[str]) -> None:
    """Leave bars as they are: |Omega| is a size in our docstrings, and no substitution."""
    lines[:] = [line if _PROMPT.match(line) else re.sub(r"\\?\|", r"\\|", line) for line in lines]


def setup(app) -> None:
    """Add formulas as TeX, for a build that has no MathJax, and docstrings as we write them."""
    app.connect("autodoc-process-docstring", _bars)
    app.add_html_math_renderer("tex", (_tex_inline, None), (_tex_block, None))
