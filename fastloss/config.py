"""Settings that may be changed at run time: `fastloss.config.min_numel = 0`."""

min_numel: int = 8192
"""Calls with fewer logits than this go to torch: no Python can beat C++ there. 0 forces the kernels, as the tests do."""

pool_min_bytes: int = 1 << 22
"""Gradients on CPU from this size on come from the pool of huge-page memory (`fastloss.memory`). Smaller ones are plain tensors."""

pool_max_bytes: int = 2 << 30
"""How much freed gradient memory the pool may keep for the next step. 0 turns the pool off."""
