"""Vectors (`jobs.vectors`) from contiguous arrays, and into them. Places are counted along all axes
from the first element on, and nobody checks that an array has them."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from jobs.kernels.numba_compile import types
from jobs.vectors import INTS, LANES, MASK, REALS, Value, Vector, call, in_all, intrinsic, llvm_type


def _pointer(context: Any, builder: Any, kind: Any, array: Value, at: Value) -> Value:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])


@intrinsic
def load(typing: Any, array: Any, start: Any) -> Any:
    """The elements from `start` on; uint8 become int32."""
    kind = INTS if array.dtype == types.uint8 else Vector(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        stored = llvm_type(Vector(array.dtype))
        first = _pointer(context, builder, signature.args[0], *given)
        found = builder.load(builder.bitcast(first, stored.as_pointer()), align=1)
        return found if stored == llvm_type(kind) else builder.zext(found, llvm_type(kind))

    return kind(array, types.int64), generate


@intrinsic
def store(typing: Any, array: Any, start: Any, values: Any) -> Any:
    """Make `values` the elements from `start` on, of as many bits each."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        first = _pointer(context, builder, signature.args[0], *given[:2])
        builder.store(given[2], builder.bitcast(first, given[2].type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, values), generate


@intrinsic
def gather(typing: Any, array: Any, start: Any, places: Any) -> Any:
    """The float32 elements at `start` plus `places`, which are int32."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        first = _pointer(context, builder, signature.args[0], *given[:2])
        each = builder.gep(first, [given[2]], source_etype=ir.FloatType())
        each.type = ir.VectorType(first.type, LANES)  # llvmlite knows of one place only
        gives = llvm_type(REALS)
        return call(
            builder, f"llvm.masked.gather.v{LANES}f32.v{LANES}p0", gives, each, ir.IntType(32)(4),
            ir.Constant(llvm_type(MASK), [1] * LANES), ir.Constant(gives, ir.Undefined),
        )  # fmt: skip

    return REALS(array, types.int64, places), generate


@intrinsic
def permute(typing: Any, array: Any, start: Any, places: Any) -> Any:
    """As `gather`, of places that do not decrease and differ by less than `LANES`: one load of what
    lies between them, and nothing else, and one permutation. For processors with AVX-512."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Value:
        array, start, places = given
        lane, gives = ir.IntType(32), llvm_type(REALS)
        lowest, highest = (builder.extract_element(places, lane(at)) for at in (0, LANES - 1))
        behind = builder.sub(places, in_all(builder, lowest))
        needed = builder.icmp_signed(
            "<=", ir.Constant(llvm_type(INTS), list(range(LANES))),
            in_all(builder, builder.sub(highest, lowest)),
        )  # fmt: skip
        first = builder.add(start, builder.sext(lowest, start.type))
        between = call(
            builder, f"llvm.masked.load.v{LANES}f32.p0", gives,
            _pointer(context, builder, signature.args[0], array, first), lane(4), needed,
            ir.Constant(gives, None),
        )  # fmt: skip
        return call(builder, "llvm.x86.avx512.permvar.sf.512", gives, between, behind)

    return REALS(array, types.int64, places), generate
