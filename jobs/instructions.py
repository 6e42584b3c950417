"""Instructions that numba has no name for, for kernels. They change how nothing else calculates.

Whoever changes one touches the files of the kernels that use it: numba keeps these compiled, and
looks at their own file alone.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import extending

from jobs.compiled import types

LANES = 64  # of `where_at_least_one`

intrinsic: Any = extending.intrinsic  # its type is of what it takes, not of what it makes


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once; float32."""
    real = types.float32
    return real(real, real, real), lambda _, builder, __, given: builder.fma(*given)


@intrinsic
def nearest(typing: Any, a: Any) -> Any:
    """The nearest integer, the even one of two, as a real of the same kind."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        rounded = builder.module.declare_intrinsic("llvm.nearbyint", [given[0].type])
        return builder.call(rounded, given)

    return a(a), generate


@intrinsic
def bits_of(typing: Any, a: Any) -> Any:
    """The int32 of a float32's bits."""
    integer = ir.IntType(32)
    return types.int32(types.float32), lambda _, builder, __, x: builder.bitcast(x[0], integer)


@intrinsic
def float_of(typing: Any, a: Any) -> Any:
    """The float32 of an int32's bits."""
    real = ir.FloatType()
    return types.float32(types.int32), lambda _, builder, __, x: builder.bitcast(x[0], real)


@intrinsic
def widest_vectors(typing: Any) -> Any:
    """In a function that calls it, LLVM takes the widest vectors of the machine; with AVX-512 it
    prefers half of them. Bits are the same."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        # llvmlite checks what is added, but prints whatever the set holds
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def where_at_least_one(typing: Any, row: Any, start: Any, factor: Any) -> Any:
    """Bit j is set where row[start + j] * factor >= 1, for j from 0 to `LANES` - 1, all of which
    must be places of the contiguous float32 `row`."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        vector, lane = ir.VectorType(ir.FloatType(), LANES), ir.IntType(32)
        first = builder.gep(context.make_array(row)(context, builder, given[0]).data, [given[1]])
        values = builder.load(builder.bitcast(first, vector.as_pointer()), align=4)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), given[2], lane(0))
        factors = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(lane, LANES), None))
        ones = ir.Constant(vector, [1.0] * LANES)
        reached = builder.fcmp_ordered(">=", builder.fmul(values, factors), ones)
        return builder.bitcast(reached, ir.IntType(LANES))

    return types.int64(row, types.int64, types.float32), generate


@intrinsic
def lowest_bit(typing: Any, bits: Any) -> Any:
    """The place of the lowest bit that is set in an int64 other than 0."""
    return types.int64(types.int64), lambda _, builder, __, given: builder.cttz(
        given[0], ir.Constant(ir.IntType(1), 1)
    )
