"""Vectors of `LANES` numbers as values in numba's kernels, with the instructions that it has no name
for. LLVM makes each operation of what the processor has: with AVX-512 a vector is a register, with
AVX2 two. Bits are the same everywhere; what the kernel does not write as fused is not fused.

Where a vector meets a number, all lanes meet it; without a vector the same functions are of numbers.
Whoever changes this file touches those of the kernels that use it: numba keeps these compiled, and
looks at their own file alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending

from jobs.compiled import types

LANES = 16

Value = Any  # of LLVM's
_LLVM: dict[Any, ir.Type] = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.boolean: ir.IntType(1),
    **{whole: ir.IntType(whole.bitwidth)
       for whole in (types.uint8, types.int32, types.uint32, types.int64)},
}  # fmt: skip
_SUFFIX = {types.float32: "f32", types.float64: "f64", types.int32: "i32", types.int64: "i64"}
_LANE = ir.IntType(32)  # the type of a lane's number

intrinsic: Any = extending.intrinsic  # its type is of what it takes, not of what it makes


class Vector(types.Type):  # type: ignore[misc, name-defined]  # numba has no types
    """numba's type of `LANES` elements."""

    def __init__(self, element: Any) -> None:
        self.element = element
        super().__init__(name=f"Vector({element})")


REALS, DOUBLES, MASK = Vector(types.float32), Vector(types.float64), Vector(types.boolean)
INTS, LONGS = Vector(types.int32), Vector(types.int64)


@extending.register_model(Vector)
class _InRegisters(extending.models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, _llvm(kind))


def _llvm(kind: Any) -> ir.Type:
    if isinstance(kind, Vector):
        return ir.VectorType(_LLVM[kind.element], LANES)
    return _LLVM[kind]


def _element(kind: Any) -> Any:
    return kind.element if isinstance(kind, Vector) else kind


def _with(kind: Any, element: Any) -> Any:
    """As many elements as `kind` has, of another type."""
    return Vector(element) if isinstance(kind, Vector) else element


def _joint(*kinds: Any) -> Any:
    return next((kind for kind in kinds if isinstance(kind, Vector)), kinds[0])


def _as(context: Any, builder: Any, value: Value, of: Any, kind: Any) -> Value:
    """A number in all lanes where `kind` has them."""
    if isinstance(of, Vector):
        return value
    number = context.cast(builder, value, of, _element(kind))
    return _in_all_lanes(builder, number) if isinstance(kind, Vector) else number


def _in_all_lanes(builder: Any, number: Value) -> Value:
    nothing = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    first = builder.insert_element(nothing, number, _LANE(0))
    return builder.shuffle_vector(
        first, nothing, ir.Constant(ir.VectorType(_LANE, LANES), [0] * LANES)
    )


def _named(builder: Any, name: str, gives: ir.Type, *given: Value) -> Value:
    """A call of one of LLVM's own functions."""
    function = builder.module.globals.get(name)
    if function is None:
        kinds = ir.FunctionType(gives, [value.type for value in given])
        function = ir.Function(builder.module, kinds, name)
    return builder.call(function, given)


def _suffix(kind: Any) -> str:
    lanes = f"v{LANES}" if isinstance(kind, Vector) else ""
    return lanes + _SUFFIX[_element(kind)]


Emit = Callable[..., Value]  # of the builder, what all operands have become, and these


def _operation(operands: int, emit: Emit, element: Any = None) -> Any:
    """An operation lane by lane on operands of one kind, which gives that kind or, where it is
    given, has another `element`."""

    def typed(*kinds: Any) -> Any:
        kind = _joint(*kinds)
        gives = kind if element is None else _with(kind, element)

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
            pairs = zip(given, signature.args, strict=True)
            alike = [_as(context, builder, value, of, kind) for value, of in pairs]
            return emit(builder, kind, *alike)

        return gives(*kinds), generate

    def one(typing: Any, a: Any) -> Any:
        return typed(a)

    def two(typing: Any, a: Any, b: Any) -> Any:
        return typed(a, b)

    def three(typing: Any, a: Any, b: Any, c: Any) -> Any:
        return typed(a, b, c)

    return intrinsic((one, two, three)[operands - 1])


def _is_real(kind: Any) -> bool:
    return isinstance(_element(kind), types.Float)


def _either(reals: str, whole: str) -> Any:
    """One of the builder's operations of two operands by what they are."""
    return _operation(
        2, lambda builder, kind, a, b: getattr(builder, reals if _is_real(kind) else whole)(a, b)
    )


def _comparison(sign: str) -> Any:
    return _operation(
        2,
        lambda builder, kind, a, b: (
            builder.fcmp_ordered(sign, a, b) if _is_real(kind) else builder.icmp_signed(sign, a, b)
        ),
        types.boolean,
    )


_OPERATORS = {
    operator.add: _either("fadd", "add"),
    operator.sub: _either("fsub", "sub"),
    operator.mul: _either("fmul", "mul"),
    operator.truediv: _either("fdiv", "sdiv"),
    operator.lshift: _either("shl", "shl"),
    operator.rshift: _either("ashr", "ashr"),
    operator.gt: _comparison(">"),
    operator.ge: _comparison(">="),
    operator.eq: _comparison("=="),
}


def _overload(sign: Any, operation: Any) -> None:
    def chosen(a, b):  # type: ignore[no-untyped-def]  # numba compares it with what it returns
        if isinstance(a, Vector) or isinstance(b, Vector):
            return lambda a, b: operation(a, b)
        return None

    extending.overload(sign)(chosen)


for _sign, _operates in _OPERATORS.items():
    _overload(_sign, _operates)


# a * b + c, rounded once; float32
fma = _operation(
    3, lambda builder, kind, *abc: _named(builder, f"llvm.fma.{_suffix(kind)}", _llvm(kind), *abc)
)
# the larger and the smaller of two that are both numbers
larger = _operation(
    2,
    lambda builder, kind, a, b: builder.select(
        builder.fcmp_ordered(">", a, b) if _is_real(kind) else builder.icmp_signed(">", a, b), a, b
    ),
)
smaller = _operation(
    2,
    lambda builder, kind, a, b: builder.select(
        builder.fcmp_ordered("<", a, b) if _is_real(kind) else builder.icmp_signed("<", a, b), a, b
    ),
)
# the int32 of a float32's bits, and back
bits_of = _operation(
    1, lambda builder, kind, a: builder.bitcast(a, _llvm(_with(kind, types.int32))), types.int32
)
float_of = _operation(
    1, lambda builder, kind, a: builder.bitcast(a, _llvm(_with(kind, types.float32))), types.float32
)
# the nearest integer, the even one of two: as a real of the same kind, and as an int32
nearest = _operation(
    1, lambda builder, kind, a: _named(builder, f"llvm.rint.{_suffix(kind)}", a.type, a)
)
nearest_int = _operation(
    1,
    lambda builder, kind, a: _named(
        builder, f"llvm.lrint.{_suffix(_with(kind, types.int32))}.{_suffix(kind)}",
        _llvm(_with(kind, types.int32)), a,
    ),
    types.int32,
)  # fmt: skip
# reals without what is behind the point, as int32 and int64
ints = _operation(
    1, lambda builder, kind, a: builder.fptosi(a, _llvm(_with(kind, types.int32))), types.int32
)
longs = _operation(
    1, lambda builder, kind, a: builder.fptosi(a, _llvm(_with(kind, types.int64))), types.int64
)
# int32 as float32, rounded; float32 as float64
reals = _operation(
    1, lambda builder, kind, a: builder.sitofp(a, _llvm(_with(kind, types.float32))), types.float32
)
doubles = _operation(
    1, lambda builder, kind, a: builder.fpext(a, _llvm(_with(kind, types.float64))), types.float64
)


def _first(context: Any, builder: Any, kind: Any, array: Value, at: Value) -> Value:
    """A pointer to an element of a contiguous array, as many as it has axes."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


@intrinsic
def load(typing: Any, array: Any, start: Any) -> Any:
    """The elements of a contiguous array from `start` on, counted along all axes; uint8 as int32.
    Nobody checks that there are so many."""
    kind = INTS if array.dtype == types.uint8 else Vector(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        stored = _llvm(Vector(array.dtype))
        first = _first(context, builder, signature.args[0], *given)
        found = builder.load(builder.bitcast(first, stored.as_pointer()), align=1)
        return found if stored == _llvm(kind) else builder.zext(found, _llvm(kind))

    return kind(array, types.int64), generate


@intrinsic
def store(typing: Any, array: Any, start: Any, values: Any) -> Any:
    """As `load`, the other way."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        first = _first(context, builder, signature.args[0], *given[:2])
        builder.store(given[2], builder.bitcast(first, given[2].type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, values), generate


@intrinsic
def gather(typing: Any, array: Any, start: Any, places: Any) -> Any:
    """float32 elements of a contiguous array, those at `places` int32 from `start` on."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        first = _first(context, builder, signature.args[0], *given[:2])
        each = builder.gep(first, [given[2]], source_etype=ir.FloatType())
        each.type = ir.VectorType(first.type, LANES)  # which llvmlite does not know of
        found = _llvm(REALS)
        return _named(
            builder, f"llvm.masked.gather.v{LANES}f32.v{LANES}p0", found, each, ir.IntType(32)(4),
            ir.Constant(_llvm(MASK), [1] * LANES), ir.Constant(found, ir.Undefined),
        )  # fmt: skip

    return REALS(array, types.int64, places), generate


@intrinsic
def where(typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """a where the mask is set, else b."""
    kind = _joint(a, b, mask)
    kind = Vector(_element(a)) if kind is mask else kind

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        both = zip(given[1:], signature.args[1:], strict=True)
        return builder.select(
            given[0], *(_as(context, builder, value, of, kind) for value, of in both)
        )

    return kind(mask, a, b), generate


@intrinsic
def in_all_lanes(typing: Any, number: Any) -> Any:
    """A vector of equal numbers."""
    return Vector(number)(number), lambda _, builder, __, given: _in_all_lanes(builder, given[0])


@intrinsic
def lane_numbers(typing: Any) -> Any:
    """int32 from 0 on."""
    return INTS(), lambda *_: ir.Constant(_llvm(INTS), list(range(LANES)))


@intrinsic
def sum_of_lanes(typing: Any, values: Any) -> Any:
    """Of int64."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        name = f"llvm.vector.reduce.add.{_suffix(values)}"
        return _named(builder, name, _llvm(values.element), *given)

    return values.element(values), generate


@intrinsic
def set_lanes(typing: Any, mask: Any) -> Any:
    """How many lanes of a mask are set."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        bits = builder.bitcast(given[0], ir.IntType(LANES))
        return builder.zext(builder.ctpop(bits), ir.IntType(64))

    return types.int64(mask), generate


@intrinsic
def compress(typing: Any, values: Any, mask: Any) -> Any:
    """The lanes whose mask is set, one behind the other from the first lane on; others are
    undefined."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        nothing = ir.Constant(_llvm(values), ir.Undefined)
        name = f"llvm.experimental.vector.compress.{_suffix(values)}"
        return _named(builder, name, _llvm(values), *given, nothing)

    return values(values, mask), generate
