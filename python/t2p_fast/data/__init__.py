# SPDX-License-Identifier: Apache-2.0
"""Datasets: procedural scenes, dead leaves, folders of pictures."""
