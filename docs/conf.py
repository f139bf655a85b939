# SPDX-License-Identifier: MIT
"""The documentation site: ``nox -s docs`` builds it in build/docs; warnings are errors."""

import argparse
import re

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import dlnfast
from dlnfast.cli import _parser

project = "dlnfast"
author = "the authors of dlnfast"
project_copyright = author
version = release = dlnfast.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # a copy of MathJax in the site: mathematics needs no network
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = f"dlnfast {release}"
myst_enable_extensions = ["amsmath", "dollarmath", "html_image", "tasklist"]
myst_heading_anchors = 3

autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
# `name` in a docstring links to the object of that name, if it is on the site.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:obj", ".*")]
# A class attribute of PEFT's interface, not a part of ours.
nitpick_ignore = [("py:class", "dlnfast.integrations.peft.DeepLoraLayer")]


class CommandHelp(SphinxDirective):
    """The output of ``dlnfast COMMAND --help``, or of ``dlnfast COMMAND ACTION --help``."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the help text of one command as a literal block."""
        parser = _parser()
        for name in self.arguments:
            if hasattr(parser, "fill"):
                parser.fill()
            (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
            parser = commands.choices[name]
        text = parser.format_help()
        return [nodes.literal_block(text, text, language="text")]


def replace_links(app, docname, source) -> None:
    """Replace links to files outside of docs by links to the pages that include them."""
    for file, page in (("CONTRIBUTING", "develop/contributing"), ("CHANGELOG", "develop/changes")):
        target = "../" * docname.count("/") + page
        source[0] = re.sub(rf"\]\((?:\.\./)+{file}\.md", f"]({target}.md", source[0])


def setup(app) -> None:
    """Register the directive and the link replacement."""
    app.add_directive("command-help", CommandHelp)
    app.connect("source-read", replace_links)
