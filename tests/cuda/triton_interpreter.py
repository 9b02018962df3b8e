"""Triton's interpreter in an ordinary process, so that kernels run on CPU tensors beside tests that compile them.

`TRITON_INTERPRET=1` must be set before Triton is first imported and then forbids compiling. Instead `interpreted()` swaps every jitted
function of triton.language and of the kernel package for its interpreted form, and puts everything back. Triton 3.8's interpreter
truncates to bfloat16 where devices round to nearest even, leaves Python floats unwrapped where a device sees float64, rounds the product of
a fused multiply-add, and makes a float of a comparison of two single ones that meets a block; those before 3.8 make an index of a tensor in
a way that NumPy 2.4 refuses. All mended here, and made faster where half of the time went: dtypes, and checks of
overflow.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import triton
import triton.experimental.gluon  # its lazy import asserts that triton.language holds jitted functions
import triton.language as tl
from triton.language import math as tl_math
from triton.language import random as tl_random
from triton.language import standard as tl_standard
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterOptions, TensorHandle
from triton.runtime.jit import JITFunction

_interpreted: dict[Any, InterpretedFunction] = {}


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((u + (((u >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _from_bfloat16(u: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(u).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _mended_cast(original: Any) -> Any:
    def cast(source: TensorHandle, to: Any) -> TensorHandle:
        have, want = source.dtype.scalar, to.scalar
        if have == tl.bfloat16:
            return cast(TensorHandle(_from_bfloat16(source.data), tl.float32), to) if want != tl.bfloat16 else source
        if want == tl.bfloat16:
            return TensorHandle(_to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        if want == tl.float32 and have == tl.float32:
            return source
        return original(source, to)

    return cast


def _fused(x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """x y + z, rounded once where float64 holds the product."""
    wide = [t.data.astype(np.float64) if t.dtype.scalar == tl.float32 else t.data for t in (x, y, z)]
    return TensorHandle((wide[0] * wide[1] + wide[2]).astype(x.data.dtype), z.dtype.scalar)


def _mended_comparison(original: Any) -> Any:
    def compare(x: TensorHandle, y: TensorHandle) -> TensorHandle:
        return TensorHandle(original(x, y).data, tl.int1)

    return compare


def _mended_argument(original: Any) -> Any:
    def convert(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(TensorHandle(np.array([argument], np.float64), tl.float64), tl.float64)
        return original(argument)

    return convert


def _mended_patch(original: Any) -> Any:
    def patch(function: Any) -> Any:
        scope = original(function)
        tl.core.tensor.__index__ = lambda self: int(self.handle.data.item())  # before Triton 3.8: int() of an array
        return scope

    return patch


def _faster_dtype(original: Any) -> Any:
    """The stock version makes a table of all dtypes at each call."""
    of_number = cache(original)

    def dtype(of: Any) -> Any:
        return original(of) if isinstance(of.scalar, tl.pointer_type) else of_number(of.scalar)

    return dtype


def _check_overflow(x: Any, y: Any, operation: Any) -> None:
    """The stock version, ten operations of the interpreter on int64, in NumPy."""
    kind = x.type.scalar
    if kind.int_bitwidth < 64:
        do = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
        result = do(x.handle.data.astype(np.int64), y.handle.data.astype(np.int64))
        fits = kind.get_int_min_value() <= result.min() and result.max() <= kind.get_int_max_value()
        assert fits, f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"


@contextmanager
def interpreted(package: str) -> Iterator[None]:
    """Within, kernels of `package` (already imported) launched as `kernel[grid](cpu_tensors)` are interpreted. Integer overflow raises."""
    modules = [m for name, m in list(sys.modules.items()) if m is not None and (name == package or name.startswith(package + "."))]
    namespaces = [vars(m) for m in (tl, tl.core, tl_standard, tl_math, tl_random, *modules)]
    classes = [tl.core.tensor, tl.core.dtype, tl.core.tensor_descriptor_base]
    builder = interpreter.interpreter_builder
    saved_namespaces = [(d, dict(d)) for d in namespaces]
    saved_classes = [(c, dict(vars(c))) for c in classes]
    saved_builder, saved_call, saved_convert = dict(vars(builder)), InterpretedFunction.__call__, interpreter._implicit_cvt
    saved_patch, saved_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    semantic = interpreter.interpreter_semantic
    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # the stock version patches triton.language again at each call of a device function
        key = id(self.fn.__globals__)
        if key not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(key)
        return self.rewrite()(*args, **kwargs)

    launch = interpreter.GridExecutor.__call__

    def launch_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    try:
        for namespace in namespaces:
            for name, value in list(namespace.items()):
                if isinstance(value, JITFunction):
                    namespace[name] = _interpreted.setdefault(value.fn, InterpretedFunction(value.fn))
            namespace.setdefault("interpreter_semantic", interpreter.interpreter_semantic)  # rewritten functions look it up there
        builder.options = InterpreterOptions(debug=True, sanitize_overflow=True)
        builder.cast_impl = _mended_cast(builder.cast_impl)
        original = builder.create_fp_to_fp
        builder.create_fp_to_fp = lambda source, to, mode: (
            builder.cast_impl(source, to) if tl.bfloat16 in (source.dtype.scalar, to.scalar) else original(source, to, mode)
        )
        builder.create_fma = _fused
        for name in [name for name in dir(builder) if name.startswith("create_fcmp")]:
            setattr(builder, name, _mended_comparison(getattr(builder, name)))
        InterpretedFunction.__call__ = call
        interpreter.GridExecutor.__call__ = launch_afresh
        interpreter._implicit_cvt = _mended_argument(saved_convert)
        interpreter._patch_lang = _mended_patch(saved_patch)
        interpreter._get_np_dtype = _faster_dtype(saved_dtype)
        semantic.binary_op_sanitize_overflow_impl = _check_overflow
        with np.errstate(all="ignore"):
            yield
    finally:
        for namespace, saved in saved_namespaces:
            namespace.clear()
            namespace.update(saved)
        for cls, saved in saved_classes:
            for name, value in saved.items():
                if vars(cls).get(name) is not value and name not in ("__dict__", "__weakref__", "__doc__"):
                    setattr(cls, name, value)
            for name in list(vars(cls)):
                if name not in saved:
                    delattr(cls, name)
        vars(builder).clear()
        vars(builder).update(saved_builder)
        InterpretedFunction.__call__ = saved_call
        interpreter.GridExecutor.__call__ = launch
        interpreter._implicit_cvt = saved_convert
        interpreter._patch_lang, interpreter._get_np_dtype = saved_patch, saved_dtype
        del semantic.binary_op_sanitize_overflow_impl  # the instance's; the class has its own


__all__ = ["interpreted", "triton"]
