"""A CUDA device that is simulated on a CPU build of torch, to prove what a trial does on a GPU without one.

Tensors on it say `device="cuda:0"` and compute on the CPU, so that results are the CPU's to the bit. Every operation
for which a real GPU makes the host wait is recorded with its place in the source. What it cannot show: seconds, GPU
numerics, CUDA kernels of torch.compile, several GPUs.

`library.load()` comes before `import torch`, so that all of it runs in a process of its own (program.py).
"""
