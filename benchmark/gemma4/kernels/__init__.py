"""Single operations, and the runner under them.

runner    times the arms of each case in turn, and writes the result
timing    CUDA graphs and events
files     kernels that are read from their files alone
inputs    random tensors for the attention of layers
fa4       FlashAttention 4, an arm of the attention kernels
routing, decode (norms, attention), verify, extend, expert_layer
          an operation each: its cases, arms, oracle and bytes
experts   tiles of the fused experts, which are tuned, too (tiles, launches, tuner)
vision    the vision tower, a process an arm (vision_worker)
"""
