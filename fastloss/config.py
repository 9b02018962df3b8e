"""Settings that may be changed at run time: `fastloss.config.min_numel = 0`."""

min_numel: int = 1 << 18
"""The measure of a small call. Each loss has a share of it (`Loss.worth`) below which torch serves it, whose C++ is faster there:
cross_entropy 0.17 with a gradient and 0.25 without (an 18th of that with fewer than 16 classes), sigmoid losses 0.035 and less, softmax 3
and 1.2, linear losses 4; for 16-bit logits 1.4 times as much; under torch.compile, where the size is known, no share is less than 1.
Measured on 2 cores (docs/when.md); 0 forces the kernels, as the tests do."""

pool_min_bytes: int = 1 << 22
"""Gradients on CPU from this size on come from the pool of huge-page memory (`fastloss.memory`). Smaller ones are plain tensors."""

foresight_max_bytes: int = 4 << 30
"""Gradients up to this size are computed in the forward where the upstream gradient can be foreseen (`fastloss.foresight`), and
wait in memory for the backward. 0: none is."""

foresight_waiting_bytes: int = 1 << 22
"""So many bytes of such gradients may wait at a time before the next forward computes none; the first one may be larger."""

linear_chunk_bytes: int = 0
"""The linear losses hold about so many bytes of logits at a time; 0: 64 MiB on CPU, 512 MiB elsewhere."""

pool_max_bytes: int = 2 << 30
"""How much freed gradient memory the pool may keep for the next step. 0 turns the pool off."""
