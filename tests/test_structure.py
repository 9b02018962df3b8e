"""What the code must look like for people to read it: no list of parameters to be counted by finger."""

import ast
from collections.abc import Iterator
from pathlib import Path

import fastloss.kernels

KERNELS = Path(fastloss.kernels.__file__).parent
MOST = 9


def functions() -> Iterator[tuple[str, ast.FunctionDef, int]]:
    for path in sorted(KERNELS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                a = node.args
                count = len([*a.posonlyargs, *a.args, *a.kwonlyargs])
                yield path.relative_to(KERNELS).as_posix(), node, count


def test_no_kernel_launcher_or_helper_has_many_parameters() -> None:
    found = {f"{file}: {node.name} has {count}" for file, node, count in functions() if count > MOST}
    assert found == set()


def test_the_walk_sees_both_packages() -> None:
    assert {"cpu", "cuda"} <= {file.split("/")[0] for file, _, _ in functions()}
    assert sum(1 for _ in functions()) > 200
