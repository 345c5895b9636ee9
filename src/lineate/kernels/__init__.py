"""T⁵'s core as kernels, called by `lineate.ops.aligned`, which is their reference: Triton on NVIDIA GPUs, and `cpu` in C++."""
