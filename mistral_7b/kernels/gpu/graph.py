"""Work for a GPU that is recorded once and then started as a whole: CUDA graphs.

A step of the 7B model is a thousand kernels; launched one by one they keep the GPU waiting. Replayed, they are one
launch, on the tensors that they were recorded with, which are given new values before. Never yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 3  # times that a step is run before: libraries and Triton set themselves up then


class Recorder:
    """Records on one stream, as libraries keep a workspace for each, and into one pool of memory.

    What the pool's graphs use between their kernels is then as much as the largest of them needs. So none may be
    replayed while another runs, nor read from the inside of one after another was replayed: results go to tensors
    that were there before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], object], rehearse: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """The graph of `step`, which asks the device for nothing; `rehearse` runs it before, without a trace."""
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self.stream.wait_stream(here)
            with torch.cuda.stream(self.stream):
                rehearse()
            here.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            mode = "thread_local"  # other threads go on
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=mode):
                step()
        return graph
