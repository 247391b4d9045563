"""Runs tests of the CPU kernels with those for 64-bit ARM beside them, from a cross compiler, in qemu's emulator.

    python tests/kernels/emulated.py i8mm tests/kernels/test_elementwise.py      the rest are pytest's arguments

The tests see the results of this CPU's scalar kernels. The kernels for ARM compute each call too, on a copy of all
memory that it can access, and all tensors must be bit-identical afterwards.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_7b.kernels.cpu import calls, compiler

CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
SYSTEM = "/usr/aarch64-linux-gnu"  # the loader and libraries for ARM, by Debian's packages
ALIGNMENT = 64
TENSORS = weakref.WeakValueDictionary[int, Tensor]()  # those whose address was taken, by address
STRUCTURES: dict[int, ctypes.Structure | ctypes.Array[Any]] = {}


def missing() -> str:
    """What the emulation lacks; "" if nothing."""
    needed = {"g++-aarch64-linux-gnu": CROSS_COMPILER, "qemu-user-static": EMULATOR, "g++": compiler.compiler()}
    absent = [package for package, path in needed.items() if path is None]
    return f"the kernels for ARM need apt-get install {' '.join(absent)}" if absent else ""


def pointers_of(kind: Any, begin: int = 0) -> Iterator[int]:
    """The offsets of the pointers in a ctypes type."""
    if kind is ctypes.c_void_p:
        yield begin
    elif issubclass(kind, ctypes.Array):
        for i in range(kind._length_):
            yield from pointers_of(kind._type_, begin + i * ctypes.sizeof(kind._type_))
    elif issubclass(kind, ctypes.Structure):
        for name, field in (field for base in kind.__mro__ for field in base.__dict__.get("_fields_", ())):
            yield from pointers_of(field, begin + getattr(kind, name).offset)


class Image:
    """A copy of all memory that a call can access, in which pointers are offsets."""

    def __init__(self, argument: Any) -> None:
        self.bytes, self.pointers = bytearray(), list[int]()
        self.tensors: dict[int, tuple[int, Tensor]] = {}  # by the address of the storage: offset, a tensor of it
        self.root = self._add_structure(argument)

    def _add(self, data: bytes) -> int:
        """Append memory; return its offset."""
        at = len(self.bytes)
        self.bytes += data + bytes(-len(data) % ALIGNMENT)
        return at

    def _add_structure(self, value: Any) -> int:
        at = self._add(bytes(value))
        for pointer in (at + offset for offset in pointers_of(type(value))):
            (address,) = struct.unpack_from("q", self.bytes, pointer)
            if address:
                struct.pack_into("q", self.bytes, pointer, self._offset_of(address))
                self.pointers.append(pointer)
        return at

    def _offset_of(self, address: int) -> int:
        if address in STRUCTURES:
            return self._add_structure(STRUCTURES[address])
        storage = TENSORS[address].untyped_storage()
        base = storage.data_ptr()
        if base not in self.tensors:
            self.tensors[base] = self._add(ctypes.string_at(base, storage.nbytes())), TENSORS[address]
        return self.tensors[base][0] + address - base

    def check(self, after: bytes) -> None:
        """AssertionError if the tensors are not those of the image `after` the same call. NaN equals NaN."""
        for base, (at, tensor) in self.tensors.items():
            size = tensor.untyped_storage().nbytes()
            here, there = ctypes.string_at(base, size), after[at : at + size]
            if here != there:
                x, y = (torch.frombuffer(bytearray(b), dtype=tensor.dtype) for b in (here, there))
                bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
                same = (x.view(bits) == y.view(bits)) | (x.isnan() & y.isnan())
                assert same.all(), f"{int((~same).sum())} of {same.numel()} values differ on ARM"


class Emulated:
    """Has the interface of the scalar library, and compares each call with the kernels for ARM."""

    def __init__(self, instructions: str, folder: Path) -> None:
        assert not missing(), missing()
        scalar, why = compiler._build("scalar")
        assert scalar, why
        self.scalar, self.calls = compiler._load(scalar), 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiler, "compiler", lambda: CROSS_COMPILER)
            path, why = compiler._build(instructions)
        assert path, why
        self._name, program = str(path), folder / "emulated"
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run([str(CROSS_COMPILER), "-std=c++17", "-O1", str(source), "-o", str(program)], check=True)
        functions = [f"m7b_{name}" for name in compiler.FUNCTIONS]
        self.process = subprocess.Popen(
            [str(EMULATOR), "-cpu", "max", "-L", SYSTEM, str(program), self._name, *functions],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdin
        assert self.process.stdout
        self.to, self.back = self.process.stdin, self.process.stdout
        self.instructions = self.back.readline().strip()
        for i, name in enumerate(functions):
            setattr(self, name, functools.partial(self._call, i, name))

    def m7b_instructions(self) -> bytes:
        return self.instructions

    def _call(self, index: int, name: str, argument: Any) -> None:
        image = Image(argument._obj)
        numbers = [index, image.root, len(image.bytes), len(image.pointers), *image.pointers]
        self.to.write(struct.pack(f"{len(numbers)}q", *numbers) + image.bytes)
        self.to.flush()
        after = self.back.read(len(image.bytes))
        assert len(after) == len(image.bytes), f"the emulator ended in {name}, exit status {self.process.wait()}"
        getattr(self.scalar, name)(argument)
        image.check(after)
        self.calls += 1


def main(instructions: str, *arguments: str) -> int:
    """pytest's exit status, or 1 if no kernel was called."""
    data_ptr, addressof = torch.Tensor.data_ptr, ctypes.addressof

    def recorded_tensor(self: Tensor) -> int:
        address = data_ptr(self)
        TENSORS[address] = self
        return address

    def recorded_structure(value: Any) -> int:
        STRUCTURES[addressof(value)] = value
        return addressof(value)

    os.environ[compiler.VARIABLE] = "scalar"  # so the tests have fewer shapes
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        emulated = Emulated(instructions, Path(folder))
        patch.setattr(compiler, "library", lambda: emulated)
        patch.setattr(torch.Tensor, "data_ptr", recorded_tensor)
        patch.setattr(calls, "addressof", recorded_structure)
        status = pytest.main([*arguments, "-p", "no:cacheprovider"])
    print(f"{emulated.calls} calls on {emulated.m7b_instructions().decode()}")
    return int(status) or int(not emulated.calls)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
