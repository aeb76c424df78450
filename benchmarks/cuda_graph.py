# SPDX-License-Identifier: Apache-2.0
"""Providers whose call is a CUDA graph: what a small op costs without its launches from Python."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .registry import Inputs, Provider

__all__ = ["in_graph"]


def in_graph(provider: Provider) -> Provider:
    """The provider with its call captured once, and replayed ever after."""

    def build(inputs: Inputs) -> Callable[[], Any]:
        call = provider.build(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # whatever is set up at the first calls
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    return replace(provider, name=f"{provider.name}, graph", build=build, devices=("cuda",))
