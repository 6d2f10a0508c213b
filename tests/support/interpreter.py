"""Corrections to Triton's interpreter, for tests only.

Unpatched, it multiplies the bits of bfloat16 instead of their values, truncates where GPUs round to
nearest even, and computes TF32 dots in full float32, which hides TF32's error. It also fails on
runtime loop bounds with NumPy 2.4 under Triton 3.6. The patched names are private: tested with
Triton 3.6 and 3.9; ``tests/kernels/test_interpreter.py`` fails when a patch breaks.
"""

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def install() -> None:
    """Patch the interpreter of this process, once."""
    if getattr(InterpreterBuilder, "corrected", False):
        return
    InterpreterBuilder.corrected = True
    _correct_casts()
    _correct_arithmetic()
    _correct_dot()
    _correct_loop_bounds()


def _widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32).reshape(np.shape(handle.data)), tl.float32)


def _narrowed(handle):
    """Round float32 to bfloat16, to nearest even; return other dtypes unchanged."""
    if handle.data.dtype != np.float32:
        return handle
    bits = np.ascontiguousarray(handle.data).view(np.uint32)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    bits = np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)
    return TensorHandle(bits.reshape(np.shape(handle.data)), tl.bfloat16)


def _as_tf32(handle):
    """Round float32 to TF32's 10 mantissa bits as ``cvt.rna`` does."""
    bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32)
    bits = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return TensorHandle(bits.view(np.float32).reshape(np.shape(handle.data)), handle.dtype)


def _correct_casts() -> None:
    cast_impl = InterpreterBuilder.cast_impl

    def corrected(self, source, target):
        if target.scalar != tl.bfloat16:
            return cast_impl(self, _widened(source), target)
        if source.dtype.scalar == tl.bfloat16:
            return cast_impl(self, source, target)
        return _narrowed(TensorHandle(_widened(source).data.astype(np.float32), tl.float32))

    InterpreterBuilder.cast_impl = corrected


def _correct_arithmetic() -> None:
    binary_op, unary_op = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def binary(self, left, right, operation):
        if left.dtype.scalar == tl.bfloat16:
            return _narrowed(binary_op(self, _widened(left), _widened(right), operation))
        result = binary_op(self, left, right, operation)
        if result.data.dtype == np.bool_ and result.dtype.scalar != tl.int1:
            # A scalar comparison keeps the operands' dtype, which is invalid for masks.
            return TensorHandle(result.data, tl.int1)
        return result

    def unary(self, operand, operation):
        if operand.dtype.scalar == tl.bfloat16:
            return _narrowed(unary_op(self, _widened(operand), operation))
        return unary_op(self, operand, operation)

    InterpreterBuilder.binary_op, InterpreterBuilder.unary_op = binary, unary


def _correct_dot() -> None:
    create_dot = InterpreterBuilder.create_dot

    def corrected(self, left, right, total, precision, *rest):
        left, right = _widened(left), _widened(right)
        if precision == ir.INPUT_PRECISION.TF32 and left.dtype.scalar == tl.float32:
            left, right = _as_tf32(left), _as_tf32(right)
        return create_dot(self, left, right, total, precision, *rest)

    InterpreterBuilder.create_dot = corrected


def _correct_loop_bounds() -> None:
    patch_lang_tensor = interpreter._patch_lang_tensor

    def index(self):
        return int(np.asarray(self.handle.data).reshape(-1)[0])

    def corrected(tensor, *rest):
        result = patch_lang_tensor(tensor, *rest)
        if rest and hasattr(
            rest[0], "set_attr"
        ):  # Triton 3.9 reverts its patches through this scope
            rest[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index
        return result

    interpreter._patch_lang_tensor = corrected
