# SPDX-License-Identifier: MIT
"""The commands of ``dlnfast``, a module each: `add_arguments` fills its parser, `run` does the work."""
