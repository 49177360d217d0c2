"""For tests of the kernels: the interpreter's bf16 dot mended, and the assertion on errors.

Importing this mends triton's interpreter (3.6 to 3.9 multiply the raw bits of bf16 in tl.dot), so
set TRITON_INTERPRET=1, import this, and only then run kernels. On a GPU it changes nothing.
"""

import numpy as np
import triton
import triton.language as tl


def _mend_interpreter() -> None:
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    broken = builder.create_dot

    def widened(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(
            (handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32
        )

    def create_dot(self, a, b, *rest, **named):
        return broken(self, widened(a), widened(b), *rest, **named)

    builder.create_dot = create_dot


if triton.knobs.runtime.interpret:
    _mend_interpreter()
