"""What a kernel is to the host: the text to compile, how it is launched, and which of its numbers Python takes for known.

Whatever a kernel computes, it is a `Kernel` here, and its only argument is a struct that `Arguments` describes. Sizes and
places that are written down in C++ and in Python are compared by the compiler: every kernel ends in a `static_assert` for each
of them (`Kernel.guards`), so a difference is an error of compilation, without a GPU.
"""

import struct
from dataclasses import dataclass
from functools import cached_property

import torch

ELEMENTS = {torch.float16: "Half", torch.bfloat16: "Bfloat16"}
"""Types of activations and their names in the sources."""

MAP_BYTES = 128
"""Size of a tensor map, which may come before an argument's fields; it must be aligned to 64."""

_MAP_ALIGNMENT, _POINTER_ALIGNMENT = 64, 8


@dataclass(frozen=True)
class Arguments:
    """The struct that is a kernel's only argument: its name in C++, its fields in order as `name:code`, codes as in `struct`.

    A field may be a member of a member (`schedule.run`) or an array (`fine:9f`). `mapped` structs begin with a tensor map,
    which is no field: the driver writes it.
    """

    name: str
    fields: str
    mapped: bool = False

    @cached_property
    def layout(self) -> struct.Struct:
        """How the fields are packed."""
        return struct.Struct("".join(code for _, code in self._split))

    @property
    def lead(self) -> int:
        """Bytes before the fields."""
        return MAP_BYTES if self.mapped else 0

    @property
    def size(self) -> int:
        """Of the struct, with what C++ adds behind the last field."""
        alignment = _MAP_ALIGNMENT if self.mapped else _POINTER_ALIGNMENT
        return -(-(self.lead + self.layout.size) // alignment) * alignment

    @property
    def mirrors(self) -> tuple[tuple[str, int], ...]:
        """C++ expressions and their values: where every field lies, and the size of all."""
        places, before = [], ""
        for field, code in self._split:
            place = self.lead + struct.calcsize(f"{before}0{code.lstrip('0123456789')}")
            places.append((f"offset_of<{self.name}>(&kOverlay<{self.name}>.whole.{field})", place))
            before += code
        return (*places, (f"sizeof({self.name})", self.size))

    @cached_property
    def _split(self) -> list[tuple[str, str]]:
        return [(field, code) for field, _, code in (item.partition(":") for item in self.fields.split())]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel for one target. The functions that make kernels keep them, so that each is compiled and loaded once.

    name          as shown to users, and the key of the register table
    target        what it is compiled for
    file          below `kernels/`
    expression    the instantiation in C++, such as `narrow_kernel<Narrow<1, 1, 4, 2>, Half, true>`
    threads       of a CTA
    arguments     its only argument
    shared_bytes  dynamic shared memory of a CTA
    overlaps      it may start before the kernel before it has ended: it waits by itself, or reads nothing of it
    mirrors       C++ constants that Python computes as well, and their values here
    """

    name: str
    target: str
    file: str
    expression: str
    threads: int
    arguments: Arguments
    shared_bytes: int = 0
    overlaps: bool = False
    mirrors: tuple[tuple[str, int], ...] = ()

    @property
    def guards(self) -> str:
        """What is compiled behind the source, without a trace in the machine code."""
        known = (*self.arguments.mirrors, *self.mirrors)
        return "".join(f'static_assert({what} == {value}, "ops/ takes {what} for {value}");\n' for what, value in known)
