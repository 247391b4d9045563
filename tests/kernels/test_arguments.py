"""The structures of arguments.py and of the C++ headers have the same names, fields, order and types."""

from __future__ import annotations

import ctypes
import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mistral_7b.kernels.cpu import arguments, compiler

HEADERS = [path for path in compiler.sources() if path.suffix == ".h"]
STRUCTURES = {
    name: kind
    for name, kind in inspect.getmembers(arguments, inspect.isclass)
    if issubclass(kind, ctypes.Structure) and kind is not ctypes.Structure
}
CTYPES = {"int64_t": ctypes.c_int64, "int": ctypes.c_int, "float": ctypes.c_float}


def parse_struct(name: str) -> tuple[str | None, list[tuple[str, type]]]:
    """The base and the fields of a C++ structure."""
    pattern = rf"^struct {name}(?: : (\w+))? \{{\n(.*?)^\}};"
    ((base, body),) = [m for path in HEADERS for m in re.findall(pattern, path.read_text(), re.M | re.S)]
    fields = []
    for statement in re.sub(r"//.*", "", body).split(";"):
        if not (declared := " ".join(statement.split())):
            continue
        kind, names = re.fullmatch(r"(?:const |struct )*(\w+)(.*)", declared).groups()  # type: ignore[union-attr]
        for field in re.sub(r"\bconst\b", "", names).split(","):
            pointer = "*" in field
            found = ctypes.c_void_p if pointer else CTYPES.get(kind) or STRUCTURES[kind]
            fields.append((field.replace("*", "").strip(), found))
    return base or None, fields


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_have_the_fields_of_the_headers(name: str) -> None:
    kind = STRUCTURES[name]
    base, fields = parse_struct(name)
    assert [(field, found) for field, found in kind._fields_] == fields
    assert kind.__base__ is (STRUCTURES[base] if base else ctypes.Structure)


def test_every_function_takes_a_known_structure() -> None:
    source = compiler.SOURCE.read_text()
    taken = dict(re.findall(r"^void m7b_(\w+)\(const (\w+)\* \w+\)", source, re.M))
    assert set(taken) == set(compiler.FUNCTIONS)
    assert set(taken.values()) <= set(STRUCTURES)


@pytest.mark.skipif(compiler.compiler() is None, reason="no C++ compiler on this machine")
def test_structures_have_the_sizes_of_the_compiler(tmp_path: Path) -> None:
    """Detects differences in alignment and inheritance, which names and types do not show."""
    source, program = tmp_path / "sizes.cpp", tmp_path / "sizes"
    lines = "".join(f'    std::printf("{name} %zu\\n", sizeof({name}));\n' for name in STRUCTURES)
    headers = (compiler.SOURCE.with_name(name) for name in ("layers.h", "rounding.h", "dequantize.h"))
    include = "#include <cstdio>\n" + "".join(f'#include "{header}"\n' for header in headers)
    source.write_text(f"{include}int main() {{\n{lines}}}\n")
    cxx = compiler.compiler()
    assert cxx is not None
    subprocess.run([cxx, "-std=c++17", "-w", str(source), "-o", str(program)], check=True)
    printed = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    sizes = {name: int(size) for name, size in (line.split() for line in printed.splitlines())}
    assert sizes == {name: ctypes.sizeof(kind) for name, kind in STRUCTURES.items()}


def test_a_moved_field_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(compiler.SOURCE.parent, tmp_path / "cpu")
    moved = tmp_path / "cpu" / "elementwise.h"
    moved.write_text(moved.read_text().replace("int64_t M, D;", "int64_t D, M;"))
    monkeypatch.setattr("test_arguments.HEADERS", [moved])
    assert parse_struct("RMSNormCall")[1] != list(arguments.RMSNormCall._fields_)
