"""Compiled kernels on disk: Numba's cache, except that whatever is wrong with it only costs a compilation.

Numba trusts what it finds. A file cut short by a full disk or a killed process would raise in this and every later process; two processes
that save at the same time can leave one kernel's code under the other's key; and a directory that cannot be written any more would lose
the kernel that has just been compiled.

Of processes that want the same kernel at the same time, as ranks do, one compiles it; the others wait, and find it.
"""

import gc
import hashlib
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc

try:
    import fcntl
except ImportError:  # Windows: every process compiles
    fcntl = None  # type: ignore[assignment]

_PATIENCE = 60  # seconds until a process no longer believes that another one is compiling, ten times what that takes


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
        self._turn: int | None = None  # an open file: to compile this function is this process's turn

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function. None if there is none, and then it is this process's turn to compile it, until `end_turn`."""
        found = self._load(sig, target_context)
        if found is None:
            self._take_turn()
            found = self._load(sig, target_context)  # somebody may have been faster
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function, if that can be."""
        with suppress(Exception):
            super().save_overload(sig, data)

    def end_turn(self) -> None:
        """Let others compile this function."""
        if self._turn is not None:
            with suppress(OSError):
                fcntl.flock(self._turn, fcntl.LOCK_UN)  # a process forked meanwhile has the file open, too: closing would not be enough
            os.close(self._turn)
            self._turn = None

    def _load(self, sig: Any, target_context: Any) -> Any:
        """None if there is none or it is damaged; a damaged one is forgotten."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # pickle may raise anything
            with suppress(OSError):
                self.flush()
            return None

    def _take_turn(self) -> None:
        """Wait for whoever compiles this function; in vain where files cannot be locked, or nobody ever ends."""
        if fcntl is None or self._turn is not None:
            return
        with suppress(OSError):
            self._impl.locator.ensure_cache_path()
            self._turn = os.open(os.path.join(self.cache_path, f"{self._impl.filename_base}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
            end = monotonic() + _PATIENCE
            while not _locked(self._turn) and monotonic() < end:
                sleep(0.02)


def _locked(file: int) -> bool:
    """Whether nobody else has locked the file; from now on this process has."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Function(CFunc):  # type: ignore[misc]
    """Numba's, compiled without a look for garbage meanwhile: half a million objects come and go, an eighth of the time went into that."""

    def _compile_uncached(self) -> Any:
        collecting = gc.isenabled()  # nobody else compiles now: Numba's lock is held
        gc.disable()
        try:
            return super()._compile_uncached()  # type: ignore[misc]
        finally:
            if collecting:
                gc.enable()


def compiled(body: Callable[..., None], signature: Any) -> Any:
    """Numba's C function of this signature, from disk where it is."""
    function: Any = _Function(body, (signature.args, signature.return_type), {}, {"error_model": "numpy"})
    cache = None
    with suppress(Exception):  # without a place that can be written, every process compiles
        function._cache = cache = KernelCache(body)
    try:
        function.compile()
    finally:
        if cache is not None:
            cache.end_turn()
    return function
