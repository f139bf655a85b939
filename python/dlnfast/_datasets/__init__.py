# SPDX-License-Identifier: MIT
"""Loaders of public data sets from local files: images, ratings, texts. Nothing is downloaded."""
