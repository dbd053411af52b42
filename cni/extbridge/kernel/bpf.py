"""BPF programs that know the kernel's own structures by name.

What a program says of them is right for structures of its own; the kernel puts in what is right for
its structures of these names (CO-RE relocations, bpf_core_apply), which needs Linux 5.17 or later
with BTF. So nothing here depends on the kernel that runs it, and no compiler is needed.

Formats: RFC 9669; linux/bpf.h, linux/btf.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Each architecture has its own number (asm/unistd.h). Big-endian ones are left out: what is said
# here of registers and bit-fields is of the others.
_SYS_BPF: Final = {
    "x86_64": 321,
    "aarch64": 280,
    "riscv64": 280,
    "loongarch64": 280,
    "ppc64le": 361,
}

_BPF_PROG_LOAD = 5
_BPF_BTF_LOAD = 18
_BPF_PROG_TYPE_SCHED_CLS = 3

_KIND_INT, _KIND_STRUCT, _KIND_FUNC, _KIND_FUNC_PROTO = 1, 4, 12, 13
_BTF_MAGIC = 0xEB9F
_INT_SIGNED = 1

BYTE_OFFSET: Final = 0
LSHIFT_U64: Final = 4
RSHIFT_U64: Final = 5
"""What a relocation puts in (enum bpf_core_relo_kind): where a member is; how far to shift a word
that was loaded from there, to the left and back, until it is the member."""

_TRIES: Final = 5

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a structure: its size and place in bits; a bit-field is in one octet."""

    name: str
    size: int
    at: int


class Code:
    """Instructions, and in which of them the kernel puts what it knows of its structure."""

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, int, int | str, int]] = []
        self._labels: dict[str, int] = {}
        self.relocations: list[tuple[int, int, int]] = []

    def add(
        self, code: int, target: int = 0, source: int = 0, *, to: int | str = 0, value: int = 0
    ) -> None:
        """Add one; `to` is an offset, or the label that a jump leads to."""
        self._instructions.append((code, target, source, to, value))

    def add_relocated(self, code: int, target: int, *, member: int, kind: int, value: int) -> None:
        """Add one whose `value` is that of our own structure's member, of this number."""
        self.relocations.append((len(self._instructions), member, kind))
        self.add(code, target, value=value)

    def label(self, name: str) -> None:
        """What comes next goes by this name."""
        self._labels[name] = len(self._instructions)

    def packed(self) -> bytes:
        """As the kernel takes it (struct bpf_insn)."""
        packed = b""
        for at, (code, target, source, to, value) in enumerate(self._instructions):
            offset = self._labels[to] - at - 1 if isinstance(to, str) else to
            packed += struct.pack("=BBhi", code, source << 4 | target, offset, value)
        return packed


def load_classifier(name: str, code: Code, structure: str, members: Sequence[Member]) -> int:
    """Have the kernel take a program that classifies frames; the answer is its fd, the caller's.

    `members` are those of our own structure that `code` means by their numbers; the name is of at
    most 15 octets. The program's license is BSD or GPL. Raises OSError.
    """
    types, function, paths = _types(name, structure, members)
    # struct bpf_core_relo; places in the code are in octets.
    relocations = b"".join(
        struct.pack("=IIII", at * 8, function.structure, paths[member], kind)
        for at, member, kind in code.relocations
    )
    instructions = code.packed()
    buffer = ctypes.create_string_buffer
    types_fd = _bpf("types", _BPF_BTF_LOAD, "=QQIII", buffer(types), 0, len(types), 0, 0)
    try:
        return _bpf(
            f"program {name}",
            _BPF_PROG_LOAD,
            "=IIQQIIQII16sIIIIQIIQIIIIQQII",
            _BPF_PROG_TYPE_SCHED_CLS,
            len(instructions) // 8,
            buffer(instructions),
            buffer(b"Dual BSD/GPL"),
            *(0, 0, 0, 0, 0),  # no log, no flags
            name.encode(),
            *(0, 0),  # no device
            types_fd,
            *(8, buffer(struct.pack("=II", 0, function.number)), 1),
            *(0, 0, 0, 0, 0),  # no lines, nothing that it is attached to
            len(code.relocations),
            0,
            buffer(relocations),
            *(16, 0),
        )
    finally:
        os.close(types_fd)


def tag_of(program: int) -> bytes:
    """What the kernel has made of the program's instructions (bpf_prog_show_fdinfo)."""
    for line in Path(f"/proc/self/fdinfo/{program}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "prog_tag":
            return bytes.fromhex(value)
    raise OSError(errno.EINVAL, f"fd {program} is no BPF program")


@dataclass(frozen=True, slots=True)
class _Function:
    number: int
    structure: int


def _types(
    name: str, structure: str, members: Sequence[Member]
) -> tuple[bytes, _Function, list[int]]:
    """Our structure and the program's function (struct btf_header), and the way to each member."""
    strings = b"\0"

    def string(value: str) -> int:
        nonlocal strings
        strings += value.encode() + b"\0"
        return len(strings) - len(value) - 1

    # Each is a struct btf_type and what its kind adds; the first is number 1.
    integers = [
        struct.pack("=IIII", string(f"u{size}"), _KIND_INT << 24, size // 8, size)
        for size in (8, 16)
    ]
    integers.append(struct.pack("=IIII", string("int"), _KIND_INT << 24, 4, _INT_SIGNED << 24 | 32))
    kind_flag = 1 << 31  # offsets have the size of a bit-field above them
    size = max(it.at + it.size for it in members) // 8
    ours = struct.pack(
        "=III", string(structure), kind_flag | _KIND_STRUCT << 24 | len(members), size
    )
    for it in members:
        field = it.size if it.size < 8 else 0
        ours += struct.pack("=III", string(it.name), 1 + (it.size > 8), field << 24 | it.at)
    types = [
        *integers,
        ours,
        struct.pack("=III", 0, _KIND_FUNC_PROTO << 24, len(integers)),
        struct.pack("=III", string(name), _KIND_FUNC << 24, len(integers) + 2),
    ]
    paths = [string(f"0:{number}") for number in range(len(members))]
    packed = b"".join(types)
    header = struct.pack(
        "=HBBIIIII", _BTF_MAGIC, 1, 0, 24, 0, len(packed), len(packed), len(strings)
    )
    return header + packed + strings, _Function(len(types), len(integers) + 1), paths


def _bpf(
    what: str, command: int, layout: str, *fields: int | bytes | ctypes.Array[ctypes.c_char]
) -> int:
    """bpf(2) with the fields of its union bpf_attr, buffers by their address; the answer's fd."""
    number = _SYS_BPF.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"bpf {what}: not known on {platform.machine()}")
    values = [ctypes.addressof(it) if isinstance(it, ctypes.Array) else it for it in fields]
    packed = struct.pack(layout, *values)
    code = 0
    for _ in range(_TRIES):
        fd: int = _libc.syscall(number, command, ctypes.create_string_buffer(packed), len(packed))
        if fd >= 0:
            # Closed on exec: bpf_prog_new_fd, btf_new_fd.
            return fd
        code = ctypes.get_errno()
        # A signal has interrupted the verifier.
        if code != errno.EAGAIN:
            break
    raise OSError(code, f"bpf {what}: {os.strerror(code)}")
