"""The documentation site: `make docs`. Sphinx reads the repository as it is, links included."""

from __future__ import annotations

import sys
from pathlib import Path

import tekfac

sys.path.insert(0, str(Path(__file__).resolve().parent))

project = "tekfac"
author = "the tekfac authors"
copyright = "the tekfac authors"
version = release = tekfac.__version__
language = "en"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "contents",
    "docstrings",
    "drawings",
    "examples",
    "galleries",
    "kept",
    "mathml",
    "offline",
]
root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "results/**.md",
    "benchmarks/README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
]
exclude_patterns = [".*", "build", "data", "dist", "runs", "src", "tests"]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# Single backticks in docstrings: a link if there is such an object, else code.
default_role = "py:obj"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "tekfac"
html_static_path = ["../assets"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0a7d80", "color-brand-content": "#0a7d80"},
    "dark_css_variables": {"color-brand-primary": "#4cc9cb", "color-brand-content": "#4cc9cb"},
    "footer_icons": [],
}
pygments_style = "default"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"
