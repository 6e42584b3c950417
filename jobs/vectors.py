"""Vectors of `LANES` numbers as values in numba's kernels, with instructions that it has no name
for. LLVM makes each operation of what the processor has: with AVX-512 a vector is one register,
with AVX2 two. Bits are the same everywhere, and no product is merged with a sum but by `fma`.

Operators and functions work lane by lane; where a vector meets a number, all lanes do. Kernels
that use this file, or vector_memory.py, hold a digest of both: numba keeps them compiled, and looks
at their own file alone.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending
from numba.core.registry import cpu_target

from jobs.kernels.numba_compile import types

LANES = 16
# for `compress`, which is one instruction there and dozens elsewhere, and for
# `jobs.vector_memory.permute`, which is not to be had elsewhere
AVX512 = "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2]

Value = Any  # of LLVM's
_Emit = Callable[..., Value]  # of the builder and of operands, all of one type
_LLVM: dict[Any, ir.Type] = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.boolean: ir.IntType(1),
    **{whole: ir.IntType(whole.bitwidth)
       for whole in (types.uint8, types.int32, types.uint32, types.int64)},
}  # fmt: skip

intrinsic: Any = extending.intrinsic  # its type is of what it takes, not of what it makes


class Vector(types.Type):
    """numba's type of a vector of `element`."""

    def __init__(self, element: Any) -> None:
        self.element = element
        super().__init__(name=f"Vector({element})")


REALS, DOUBLES, MASK = Vector(types.float32), Vector(types.float64), Vector(types.boolean)
INTS, LONGS = Vector(types.int32), Vector(types.int64)


@extending.register_model(Vector)
class _InRegisters(extending.models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, llvm_type(kind))


def llvm_type(kind: Vector) -> ir.Type:
    """LLVM's type of the values of numba's."""
    return ir.VectorType(_LLVM[kind.element], LANES)


def in_all(builder: Any, number: Value) -> Value:
    """A vector of equal numbers."""
    nothing = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    first = builder.insert_element(nothing, number, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, nothing, lanes)


def call(builder: Any, name: str, gives: ir.Type, *given: Value) -> Value:
    """One of LLVM's own functions, by its whole name."""
    function = builder.module.globals.get(name)
    if function is None:
        kinds = ir.FunctionType(gives, [value.type for value in given])
        function = ir.Function(builder.module, kinds, name)
    return builder.call(function, given)


def _suffix(kind: ir.Type) -> str:
    """What LLVM's names have behind them for vectors of a type."""
    return f".v{LANES}{kind.element.intrinsic_name}"


def _lane_by_lane(element: Any = None) -> Callable[[_Emit], Any]:
    """Make a function of kernels of one that emits an operation on vectors of one type. It gives
    that type, or a vector of `element`."""

    def made(emit: _Emit) -> Any:
        def typed(*kinds: Any) -> Any:
            kind = next(kind for kind in kinds if isinstance(kind, Vector))

            def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
                return emit(builder, *_alike(context, builder, kind, signature.args, given))

            return (kind if element is None else Vector(element))(*kinds), generate

        of_operands = {  # numba takes their number from the function, and no *operands
            1: lambda typing, a: typed(a),
            2: lambda typing, a, b: typed(a, b),
            3: lambda typing, a, b, c: typed(a, b, c),
        }
        return intrinsic(of_operands[len(inspect.signature(emit).parameters) - 1])

    return made


def _alike(context: Any, builder: Any, kind: Any, kinds: Any, values: Any) -> list[Value]:
    """The operands, of which numbers become vectors."""
    return [
        value if isinstance(own, Vector)
        else in_all(builder, context.cast(builder, value, own, kind.element))
        for value, own in zip(values, kinds, strict=True)
    ]  # fmt: skip


def _is_real(value: Value) -> bool:
    return not isinstance(value.type.element, ir.IntType)


def _arithmetic(of_reals: str, of_ints: str) -> Any:
    return _lane_by_lane()(
        lambda builder, a, b: getattr(builder, of_reals if _is_real(a) else of_ints)(a, b)
    )


def _compare(sign: str, builder: Any, a: Value, b: Value) -> Value:
    return (builder.fcmp_ordered if _is_real(a) else builder.icmp_signed)(sign, a, b)


def _comparison(sign: str) -> Any:
    return _lane_by_lane(types.boolean)(lambda builder, a, b: _compare(sign, builder, a, b))


def _overload(sign: Any, operation: Any) -> None:
    # without annotations: numba refuses one whose whole signature is not that of what it returns
    def chosen(a, b):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        if isinstance(a, Vector) or isinstance(b, Vector):
            return lambda a, b: operation(a, b)
        return None

    extending.overload(sign)(chosen)


for _sign, _operates in {
    operator.add: _arithmetic("fadd", "add"),
    operator.sub: _arithmetic("fsub", "sub"),
    operator.mul: _arithmetic("fmul", "mul"),
    operator.truediv: _lane_by_lane()(lambda builder, a, b: builder.fdiv(a, b)),
    operator.lshift: _lane_by_lane()(lambda builder, a, b: builder.shl(a, b)),
    operator.rshift: _lane_by_lane()(lambda builder, a, b: builder.ashr(a, b)),
    operator.gt: _comparison(">"),
    operator.ge: _comparison(">="),
    operator.eq: _comparison("=="),
}.items():
    _overload(_sign, _operates)


@_lane_by_lane()
def fma(builder: Any, a: Value, b: Value, c: Value) -> Value:
    """a * b + c of reals, rounded once."""
    return call(builder, "llvm.fma" + _suffix(a.type), a.type, a, b, c)


@_lane_by_lane()
def larger(builder: Any, a: Value, b: Value) -> Value:
    """The larger of two that are not nan, the second where they are equal."""
    return builder.select(_compare(">", builder, a, b), a, b)


@_lane_by_lane()
def smaller(builder: Any, a: Value, b: Value) -> Value:
    """The smaller of two that are not nan, the second where they are equal."""
    return builder.select(_compare("<", builder, a, b), a, b)


@_lane_by_lane()
def nearest(builder: Any, a: Value) -> Value:
    """The nearest integer, the even one of two, as a real of the same kind."""
    return call(builder, "llvm.rint" + _suffix(a.type), a.type, a)


@_lane_by_lane(types.int32)
def nearest_int(builder: Any, a: Value) -> Value:
    """As `nearest`, but an int32."""
    gives = llvm_type(INTS)
    return call(builder, "llvm.lrint" + _suffix(gives) + _suffix(a.type), gives, a)


@_lane_by_lane(types.int32)
def bits_of(builder: Any, a: Value) -> Value:
    """The int32 of a float32's bits."""
    return builder.bitcast(a, llvm_type(INTS))


@_lane_by_lane(types.float32)
def float_of(builder: Any, a: Value) -> Value:
    """The float32 of an int32's bits."""
    return builder.bitcast(a, llvm_type(REALS))


@_lane_by_lane(types.float32)
def reals(builder: Any, a: Value) -> Value:
    """Integers as float32, rounded."""
    return builder.sitofp(a, llvm_type(REALS))


@_lane_by_lane(types.float64)
def doubles(builder: Any, a: Value) -> Value:
    """float32 as float64."""
    return builder.fpext(a, llvm_type(DOUBLES))


@_lane_by_lane(types.int32)
def ints(builder: Any, a: Value) -> Value:
    """Reals without what is behind their point, as int32."""
    return builder.fptosi(a, llvm_type(INTS))


@_lane_by_lane(types.int64)
def longs(builder: Any, a: Value) -> Value:
    """As `ints`, but int64."""
    return builder.fptosi(a, llvm_type(LONGS))


@intrinsic
def where(typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """a where the mask is set, else b; either may be a number."""
    kind = next((one for one in (a, b) if isinstance(one, Vector)), Vector(a))

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        both = _alike(context, builder, kind, signature.args[1:], given[1:])
        return builder.select(given[0], *both)

    return kind(mask, a, b), generate


@intrinsic
def in_all_lanes(typing: Any, number: Any) -> Any:
    """A vector of equal numbers."""
    return Vector(number)(number), lambda _, builder, __, given: in_all(builder, *given)


@intrinsic
def lane_numbers(typing: Any) -> Any:
    """int32 from 0 on."""
    return INTS(), lambda *_: ir.Constant(llvm_type(INTS), list(range(LANES)))


@intrinsic
def num_set(typing: Any, mask: Any) -> Any:
    """How many lanes of a mask are set."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        bits = builder.bitcast(given[0], ir.IntType(LANES))
        return builder.zext(builder.ctpop(bits), ir.IntType(64))

    return types.int64(mask), generate


@intrinsic
def sum_of_lanes(typing: Any, values: Any) -> Any:
    """Of integers."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        name = "llvm.vector.reduce.add" + _suffix(given[0].type)
        return call(builder, name, given[0].type.element, *given)

    return values.element(values), generate


@intrinsic
def compress(typing: Any, values: Any, mask: Any) -> Any:
    """The lanes whose mask is set, one behind the other from the first lane on, then 0. Of elements
    of 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        kind = llvm_type(INTS)  # of reals LLVM 22 ends the process where there is no instruction
        name = "llvm.experimental.vector.compress" + _suffix(kind)
        bits = builder.bitcast(given[0], kind)
        found = call(builder, name, kind, bits, given[1], ir.Constant(kind, None))
        return builder.bitcast(found, given[0].type)

    return values(values, mask), generate
