"""Sixteen fp32 lanes for numba: explicit vectors, so that a sum's order is written down.

An auto-vectoriser picks a different order for a loop's body and its tail, for one row and for
four; here lane l of an accumulator adds elements l, l + 16, ... and ``total`` folds the lanes in
one fixed tree. LLVM lowers the vectors to what the CPU has (AVX-512, AVX2, NEON).

Arrays are 1-D and contiguous; ``at`` is an index into them and is not checked. ``part`` loads and
stores touch only the first ``count`` lanes; the others read as zero.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import carray
from numba.core import cgutils, types
from numba.core.types import CPointer  # type: ignore[attr-defined]
from numba.extending import intrinsic, models, register_model

from loramux_kernels.jit import counting, inlined

LANES = 16

WIDE = "+avx512f" in (numba.config.CPU_FEATURES or binding.get_host_cpu_features().flatten())
"""Sixteen lanes are one register, of 32."""

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_V = ir.VectorType(_F32, LANES)
_VI = ir.VectorType(_I32, LANES)


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name="f32x16")


_lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _V)


def _const(value: float) -> ir.Constant:
    return ir.Constant(_V, [value] * LANES)


def _int_const(value: int) -> ir.Constant:
    return ir.Constant(_VI, [value] * LANES)


def _call(builder: Any, name: str, result: Any, args: list[Any]) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in args])
    known = builder.module.globals.get(name)
    function = known or ir.Function(builder.module, function_type, name)
    return builder.call(function, args)


def _pointer(context: Any, builder: Any, signature: Any, args: Any, to: Any) -> Any:
    """Where a load or store reaches: its first two arguments are an array and an index."""
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), to.as_pointer())


def _mask(builder: Any, count: Any) -> Any:
    narrow = builder.trunc(count, _I32)
    index = ir.Constant(_VI, list(range(LANES)))
    return builder.icmp_signed("<", index, _splat(builder, narrow, _VI))


def _splat(builder: Any, scalar: Any, vector: Any) -> Any:
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def _pointer_to(element: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def pointer(typing: Any, address: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return CPointer(element)(types.intp), build

    return pointer


_to_f32 = _pointer_to(types.float32)
_to_u8 = _pointer_to(types.uint8)


@counting
def floats(address: Any, size: Any) -> Any:
    """The fp32 array of ``size`` elements at an address; whoever gives it keeps it alive."""
    return carray(_to_f32(address), (size,))


@counting
def bytes_at(address: Any, size: Any) -> Any:
    """The same for bytes."""
    return carray(_to_u8(address), (size,))


@intrinsic  # type: ignore[untyped-decorator]
def load(typing: Any, array: Any, at: Any) -> Any:
    """Lanes from an fp32 array."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature, args, _V)
        return builder.load(pointer, align=4)

    return _lanes(array, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def _load_masked(typing: Any, array: Any, at: Any, count: Any) -> Any:

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature, args, _V)
        mask = _mask(builder, args[2])
        operands = [pointer, ir.Constant(_I32, 4), mask, _const(0.0)]
        return _call(builder, "llvm.masked.load.v16f32.p0", _V, operands)

    return _lanes(array, types.intp, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def load_bf16(typing: Any, array: Any, at: Any) -> Any:
    """Lanes from bfloat16 bits in a uint16 array: bf16 is the upper half of fp32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = ir.VectorType(ir.IntType(16), LANES)
        half = builder.load(_pointer(context, builder, signature, args, bits), align=2)
        return builder.bitcast(builder.shl(builder.zext(half, _VI), _int_const(16)), _V)

    return _lanes(array, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def load_f16(typing: Any, array: Any, at: Any) -> Any:
    """Lanes from float16 bits in a uint16 array."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        halves = ir.VectorType(ir.HalfType(), LANES)
        pointer = _pointer(context, builder, signature, args, halves)
        return builder.fpext(builder.load(pointer, align=2), _V)

    return _lanes(array, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def load_i8(typing: Any, array: Any, at: Any) -> Any:
    """Lanes from an int8 array."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bytes_ = ir.VectorType(ir.IntType(8), LANES)
        small = builder.load(_pointer(context, builder, signature, args, bytes_), align=1)
        return builder.sitofp(builder.sext(small, _VI), _V)

    return _lanes(array, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def store(typing: Any, array: Any, at: Any, value: Any) -> Any:
    """Lanes into an fp32 array."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature, args, _V)
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, _lanes), build


@intrinsic  # type: ignore[untyped-decorator]
def _store_masked(typing: Any, array: Any, at: Any, value: Any, count: Any) -> Any:

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature, args, _V)
        mask = _mask(builder, args[3])
        operands = [args[2], pointer, ir.Constant(_I32, 4), mask]
        _call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), operands)
        return context.get_dummy_value()

    return types.void(array, types.intp, _lanes, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def store_between(typing: Any, array: Any, at: Any, value: Any, first: Any, last: Any) -> Any:
    """Lanes ``first`` to ``last - 1``, each to where a store of all lanes would put it."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature, args, _V)
        mask = builder.and_(_mask(builder, args[4]), builder.not_(_mask(builder, args[3])))
        operands = [args[2], pointer, ir.Constant(_I32, 4), mask]
        _call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), operands)
        return context.get_dummy_value()

    return types.void(array, types.intp, _lanes, types.intp, types.intp), build


@inlined
def load_part(array: Any, at: int, count: int) -> Any:
    """The first ``count`` lanes from an fp32 array, zeros after."""
    # A masked load cannot take what a store just wrote, so whole vectors go without.
    if count >= LANES:
        return load(array, at)
    return _load_masked(array, at, count)


@inlined
def store_part(array: Any, at: int, value: Any, count: int) -> None:
    """The first ``count`` lanes into an fp32 array."""
    if count >= LANES:
        store(array, at, value)
    else:
        _store_masked(array, at, value, count)


@intrinsic  # type: ignore[untyped-decorator]
def splat(typing: Any, value: Any) -> Any:
    """One fp32 value in every lane."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[0], _V)

    return _lanes(types.float32), build


@intrinsic  # type: ignore[untyped-decorator]
def broadcast(typing: Any, array: Any, at: Any) -> Any:
    """One number of an fp32 array in every lane: a multiply-add takes it straight from memory."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature, args, _F32)
        return _splat(builder, builder.load(pointer, align=4), _V)

    return _lanes(array, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, array: Any, at: Any) -> Any:
    """Ask for the cache line of an element that is read soon; it may lie beyond the array. It goes
    to the second cache: in the first it would drive out what is being computed with."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature, args, ir.IntType(8))
        read, second_level, data = (ir.Constant(_I32, value) for value in (0, 2, 1))
        operands = [pointer, read, second_level, data]
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), operands)
        return context.get_dummy_value()

    return types.void(array, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """``a * b + c``, rounded once."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "llvm.fma.v16f32", _V, list(args))

    return _lanes(_lanes, _lanes, _lanes), build


@intrinsic  # type: ignore[untyped-decorator]
def add(typing: Any, a: Any, b: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(*args)

    return _lanes(_lanes, _lanes), build


@intrinsic  # type: ignore[untyped-decorator]
def mul(typing: Any, a: Any, b: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(*args)

    return _lanes(_lanes, _lanes), build


@intrinsic  # type: ignore[untyped-decorator]
def div(typing: Any, a: Any, b: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fdiv(*args)

    return _lanes(_lanes, _lanes), build


@intrinsic  # type: ignore[untyped-decorator]
def total(typing: Any, value: Any) -> Any:
    """The sum of the lanes: halves, quarters, eighths, sixteenths, always in this order."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _fold(builder, args[0], builder.fadd)

    return types.float32(_lanes), build


def _added_halves(builder: Any, vectors: list[Any], width: int) -> list[Any]:
    """Values of ``width`` lanes each: pairs of vectors become one, with half as many lanes each."""
    half = width // 2
    low = [start + lane for start in range(0, 2 * LANES, width) for lane in range(half)]
    sides = [ir.Constant(_VI, [lane + shift for lane in low]) for shift in (0, half)]
    return [
        builder.fadd(*(builder.shuffle_vector(x, y, side) for side in sides))
        for x, y in zip(vectors[::2], vectors[1::2], strict=True)
    ]


@intrinsic  # type: ignore[untyped-decorator]
def folded(typing: Any, values: Any) -> Any:
    """Eight values folded as ``total`` does but for the last addition: value i's in lanes 2i and
    2i + 1. Two share a vector after the first addition, four after the second."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vectors, width = cgutils.unpack_tuple(builder, args[0], 8), LANES
        while len(vectors) > 1:
            vectors = _added_halves(builder, vectors, width)
            width //= 2
        return vectors[0]

    return _lanes(values), build


@intrinsic  # type: ignore[untyped-decorator]
def joined(typing: Any, low: Any, high: Any) -> Any:
    """``total`` of each of sixteen values, in order, out of two times eight that are folded."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _added_halves(builder, list(args), 2)[0]

    return _lanes(_lanes, _lanes), build


@intrinsic  # type: ignore[untyped-decorator]
def between(typing: Any, value: Any, first: Any, last: Any) -> Any:
    """Lanes ``first`` to ``last - 1`` of ``value``, minus infinity in the others."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        before_last = _mask(builder, args[2])
        before_first = _mask(builder, args[1])
        kept = builder.and_(before_last, builder.not_(before_first))
        return builder.select(kept, args[0], _const(float("-inf")))

    return _lanes(_lanes, types.intp, types.intp), build


@intrinsic  # type: ignore[untyped-decorator]
def largest(typing: Any, value: Any) -> Any:
    """The largest lane, NaN ignored unless all are."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def maximum(a: Any, b: Any) -> Any:
            name = "llvm.maxnum.f32" if a.type == _F32 else f"llvm.maxnum.v{a.type.count}f32"
            return _call(builder, name, a.type, [a, b])

        return _fold(builder, args[0], maximum)

    return types.float32(_lanes), build


def _fold(builder: Any, value: Any, combine: Any) -> Any:
    width = LANES
    while width > 1:
        width //= 2
        kind = ir.VectorType(_I32, width)
        undefined = ir.Constant(value.type, ir.Undefined)
        low = builder.shuffle_vector(value, undefined, ir.Constant(kind, list(range(width))))
        high = builder.shuffle_vector(
            value, undefined, ir.Constant(kind, list(range(width, 2 * width)))
        )
        value = combine(low, high)
    return builder.extract_element(value, ir.Constant(_I32, 0))


@intrinsic  # type: ignore[untyped-decorator]
def exp(typing: Any, value: Any) -> Any:
    """e^x with a relative error below 2^-23; 0 below -87.33, infinity above 88.37, NaN stays NaN.

    Cephes' expf: x = n ln2 + r with |r| <= ln2 / 2, a polynomial of degree 6 for e^r, and n added
    to the exponent.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def fused(a: Any, b: Any, c: Any) -> Any:
            return _call(builder, "llvm.fma.v16f32", _V, [a, b, c])

        x = args[0]
        # Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits.
        shifter = _const(12582912.0)
        shifted = fused(x, _const(1.44269504088896341), shifter)
        n = builder.fsub(shifted, shifter)
        r = fused(n, _const(-0.693359375), x)
        r = fused(n, _const(2.12194440e-4), r)
        p = _const(1.9875691500e-4)
        for coefficient in (
            1.3981999507e-3,
            8.3334519073e-3,
            4.1665795894e-2,
            1.6666665459e-1,
            5.0000001201e-1,
        ):
            p = fused(p, r, _const(coefficient))
        p = builder.fadd(fused(p, builder.fmul(r, r), r), _const(1.0))
        # The shift drops everything of the shifter but n.
        power = builder.shl(builder.bitcast(shifted, _VI), _int_const(23))
        power = builder.bitcast(builder.add(power, _int_const(127 << 23)), _V)
        result = builder.fmul(p, power)
        low = builder.fcmp_ordered("<", x, _const(-87.33))
        high = builder.fcmp_ordered(">", x, _const(88.37))
        result = builder.select(low, _const(0.0), result)
        return builder.select(high, _const(float("inf")), result)

    return _lanes(_lanes), build
