# SPDX-License-Identifier: Apache-2.0
"""Measures of generated pictures."""
