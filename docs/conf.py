# SPDX-License-Identifier: MIT
"""The documentation site: ``nox -s docs`` builds it into build/docs, and takes warnings for errors."""

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
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = f"dlnfast {release}"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
# `name` in a docstring leads to what it names, where that is on the site.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:obj", ".*")]
# A class attribute of PEFT's interface, not a part of ours.
nitpick_ignore = [("py:class", "dlnfast.integrations.peft.DeepLoraLayer")]


class CommandHelp(SphinxDirective):
    """What ``dlnfast COMMAND --help`` prints."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the help of one command as a block."""
        (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
        text = commands.choices[self.arguments[0]].format_help()
        return [nodes.literal_block(text, text, language="text")]


def lead_to_pages(app, docname, source) -> None:
    """Turn links to files beside docs into links to the pages that show them."""
    source[0] = re.sub(r"\]\((?:\.\./)+CONTRIBUTING\.md", "](contributing.md", source[0])


def setup(app) -> None:
    """Add what is the site's own."""
    app.add_directive("command-help", CommandHelp)
    app.connect("source-read", lead_to_pages)
