# SPDX-License-Identifier: Apache-2.0
"""Micro-benchmarks of the ops against what people use otherwise.

``t2p-fast bench vq`` from an installed package, ``python -m benchmarks.run vq`` from a checkout.
"""
