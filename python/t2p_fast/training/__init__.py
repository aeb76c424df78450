# SPDX-License-Identifier: Apache-2.0
"""Training loops, losses and recipes."""
