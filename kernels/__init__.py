"""Kernels of our own for GPUs, in Triton: what torch would do in many passes over memory, in one launch each.

Every kernel is an operation of torch's (`operation.py`), so that a trace without values sees one operation, with its
bytes. Each has an eager twin among the functions of `train` or `parallel` that say what is computed; a CPU runs those,
and Triton's interpreter holds the kernels to them. docs/kernels.md lists all of them. Not yet run on a GPU.
"""
