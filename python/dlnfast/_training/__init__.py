# SPDX-License-Identifier: MIT
"""Training: options, engines, resumable runs."""
