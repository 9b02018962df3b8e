"""Settings that may be changed at run time: `fastloss.config.min_numel = 0`."""

min_numel: int = 1 << 18
"""The measure of a small call. Each loss has a share of it (`Loss.worth`) below which torch serves it, whose C++ is faster there:
cross_entropy an eighth with a gradient and a fifth without (a 16th of that with fewer than 16 classes), sigmoid losses 0.028 and less,
softmax 2.6 and 0.4, log_softmax 0.9 and 0.4, nll_loss 16 and 64, linear losses 4; with a gradient three times as much where reduction is
'none', for 16-bit logits 1.4 times as much (but softmax); under torch.compile, where the size is known, no share is less than 1.
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
