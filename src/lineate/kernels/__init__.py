"""T⁵'s core as Triton kernels for NVIDIA GPUs, forward and backward; `lineate.ops.aligned` calls them and is their reference."""
