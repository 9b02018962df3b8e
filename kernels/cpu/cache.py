"""Compiled kernels on disk: Numba's cache, except that whatever is wrong with it only costs a compilation.

Numba trusts what it finds. A file cut short by a full disk or a killed process would raise in this and every later process; two processes
that save at the same time can leave one kernel's code under the other's key; and a directory that cannot be written any more would lose
the kernel that has just been compiled.
"""

import hashlib
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc


class _CheckedFile(IndexDataCacheFile):
    """Numba's files, where an entry says whose it is and what it must add up to."""

    def save(self, key: Any, data: Any) -> None:
        content = self._dump((str(key), data))
        super().save(key, (hashlib.sha256(content).digest(), content))

    def load(self, key: Any) -> Any:
        entry = super().load(key)
        if entry is None:
            return None
        digest, content = entry
        if hashlib.sha256(content).digest() != digest:
            raise ValueError("a damaged entry")
        name, data = pickle.loads(content)
        return data if name == str(key) else None


class KernelCache(FunctionCache):
    """The cache of one function. Raises RuntimeError or OSError if there is no place for it."""

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_file = _CheckedFile(self.cache_path, self._impl.filename_base, self._impl.locator.get_source_stamp())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function, or None if there is none or it is damaged; a damaged one is forgotten."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # pickle may raise anything
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function, if that can be."""
        with suppress(Exception):
            super().save_overload(sig, data)


def compiled(body: Callable[..., None], signature: Any) -> Any:
    """Numba's C function of this signature, from disk where it is."""
    function: Any = CFunc(body, (signature.args, signature.return_type), {}, {"error_model": "numpy"})
    with suppress(Exception):  # without a place that can be written, every process compiles
        function._cache = KernelCache(body)
    function.compile()
    return function
