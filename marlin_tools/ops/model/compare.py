"""KL and CE between two models' logits, and their gradient, token by token: on a GPU in one kernel.

Both losses are a softmax away from the logits, so their gradient has a closed form: (p_student - p_teacher) and
(p_student - onehot). The kernel, `kernels/training/compare.cu`, reads the logits twice and writes the gradient once; torch
goes over [T, V] some 25 times. No sum depends on who comes first.

Shape letters: T tokens, V vocabulary.
"""

from functools import cache

import torch
from torch import Tensor

from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.kernel import ELEMENTS, Arguments, Kernel
from marlin_tools.ops.runtime.target import target_of
from marlin_tools.quantized import dtype_name

OUTPUTS = {**ELEMENTS, torch.float32: "Single"}
"""Types of the gradient and their names in the source."""

_THREADS = 512
_ARGUMENTS = Arguments(
    "CompareArguments",
    "student:P teacher:P following:P losses:P gradient:P kl:f ce:f scale:f student_cap:f teacher_cap:f columns:i",
)


@cache
def _kernel(dtype: torch.dtype, target: str) -> Kernel:
    return Kernel(
        f"compare-{dtype_name(dtype)}",
        target,
        "training/compare.cu",
        f"compare_kernel<{OUTPUTS[dtype]}>",
        _THREADS,
        _ARGUMENTS,
        mirrors=(("kThreads", _THREADS),),
    )


def compare_kernels(target: str) -> list[Kernel]:
    """Every kernel of this kind."""
    return [_kernel(dtype, target) for dtype in OUTPUTS]


def compare(
    logits: tuple[Tensor, Tensor],
    following: Tensor,
    weights: tuple[float, float],
    *,
    scale: float,
    caps: tuple[float | None, float | None] = (None, None),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """(KL, CE) of each token [T, 2], and, in `dtype`, the gradient of `scale · Σ weights · losses` for the student's logits.

    `logits` are the student's and the teacher's, float32 [T, V], as they come out of the product with the head: `caps` are put
    on them here. `following` [T] is the token that really comes next. A token with a logit that is not finite has losses that
    are not a number.
    """
    student, teacher = logits
    if student.is_cuda:
        _check(student, teacher, following, dtype)
        return _in_one_kernel(logits, following, weights, scale, caps, dtype)
    student = _capped(student, caps[0])
    log_p, log_t = torch.log_softmax(student, dim=1), torch.log_softmax(_capped(teacher, caps[1]), dim=1)
    p_teacher, picked = log_t.exp(), following[:, None]
    losses = torch.stack([log_t.sub_(log_p).mul_(p_teacher).sum(dim=1), -log_p.gather(1, picked)[:, 0]], dim=1)
    losses += 0 * losses.sum(dim=1, keepdim=True)  # neither is a number if one is infinite
    kl, ce = weights
    slope = log_p.exp_().mul_(kl + ce).sub_(p_teacher, alpha=kl)
    if ce:
        slope.scatter_add_(1, picked, torch.full_like(picked, -ce, dtype=slope.dtype))
    if caps[0] is not None:
        slope *= 1 - (student / caps[0]).square()
    return losses, slope.mul_(scale).to(dtype)


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    """What is not finite must not hide behind the cap."""
    return logits if cap is None else torch.tanh(logits / cap).mul_(cap).add_(0 * logits)


def _in_one_kernel(
    logits: tuple[Tensor, Tensor],
    following: Tensor,
    weights: tuple[float, float],
    scale: float,
    caps: tuple[float | None, float | None],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    student, teacher = logits
    rows, columns = student.shape
    losses, gradient = student.new_empty((rows, 2)), student.new_empty((rows, columns), dtype=dtype)
    if rows and columns:
        addresses = (each.data_ptr() for each in (student, teacher, following, losses, gradient))
        kernel = _kernel(dtype, target_of(student.device))
        driver.start(kernel, rows, student, *addresses, *weights, scale, *(cap or 0.0 for cap in caps), columns)
    return losses, gradient


def _check(student: Tensor, teacher: Tensor, following: Tensor, dtype: torch.dtype) -> None:
    """Refuse, by name, what the kernel cannot read."""
    if dtype not in OUTPUTS:
        raise TypeError(f"the gradient must be float32, float16 or bfloat16, got {dtype}")
    shapes = {"student": student.shape, "teacher": student.shape, "following": student.shape[:1]}
    for (name, shape), tensor in zip(shapes.items(), (student, teacher, following), strict=True):
        needed = torch.int64 if name == "following" else torch.float32
        if tensor.dtype != needed or tensor.shape != shape or tensor.device != student.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, "
                f"must be {needed} {list(shape)} on {student.device}"
            )
        if not tensor.is_contiguous() or (needed == torch.float32 and tensor.data_ptr() % 16):
            raise ValueError(f"{name} must be contiguous and begin at a multiple of 16 bytes")
