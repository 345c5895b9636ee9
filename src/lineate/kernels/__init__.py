"""Triton kernels: T⁵'s core on NVIDIA GPUs, forward and backward. `lineate.ops.aligned` calls them; the eager code is the reference."""
