"""Capture of CUDA graphs.

A step of the 7B model launches a thousand kernels, and the GPU waits for their launches. A captured graph replays
them with one launch, on the tensors of the capture, into which new values are copied before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 3  # runs before capture, in which libraries and Triton initialize


class Recorder:
    """Captures graphs on one stream, since libraries keep a workspace per stream, and into one memory pool.

    The graphs share the pool's memory for intermediate tensors, so it is as large as the largest graph needs. Do
    not replay two graphs concurrently, nor read a graph's intermediate tensors after replaying another: write
    results to tensors allocated before the capture.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()
            self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], object], rehearse: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Capture `step`, which must not synchronize; `rehearse` runs it before, without side effects."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                rehearse()
            current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            mode = "thread_local"  # other threads may call CUDA meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=mode):
                step()
        return graph
