"""What Numba's target, which need not be this CPU, can do: LLVM is asked."""

from collections.abc import Callable
from functools import cache

from llvmlite import binding, ir
from numba.core.registry import cpu_target

Conversion = Callable[[ir.IRBuilder, ir.Value], ir.Value]


@cache
def has_512_bits() -> bool:
    """Whether a vector fits one register: AVX-512."""
    return "%zmm" in assembly(lambda builder, value: builder.fadd(value, value), ir.VectorType(ir.FloatType(), 16))


@cache
def has_256_bits() -> bool:
    """Whether half a vector does, integers too: AVX2."""
    return "%ymm" in assembly(lambda builder, value: builder.add(value, value), ir.VectorType(ir.IntType(32), 8))


def assembly(convert: Conversion, source: ir.VectorType) -> str:
    """What LLVM makes of a conversion of such a vector."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    module = ir.Module()
    module.triple = triple
    byte = ir.IntType(8).as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [byte, byte]), "convert")
    builder = ir.IRBuilder(function.append_basic_block())
    value = convert(builder, builder.load(builder.bitcast(function.args[0], source.as_pointer()), align=1))
    builder.store(value, builder.bitcast(function.args[1], value.type.as_pointer()), align=1)
    builder.ret_void()
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    return str(machine.emit_assembly(binding.parse_assembly(str(module))))
