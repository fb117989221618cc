"""Lets fla's kernels run on the CPU, in Triton's interpreter: fp32, small shapes, one process for this folder alone.

`make test-fla` installs what this needs into an environment of its own and sets `TRITON_INTERPRET=1`. The tests of
`tests/` do not belong into that process: with fla and triton importable, transformers' own linear-attention models
call fla's kernels on CPU tensors too.

The interpreter of triton 3.9.0 lacks two things that fla 0.6.0 needs. Both are added here, on private names of
Triton, which is why `make test-fla` pins the versions. What this cannot show: code generation for a GPU, tf32 and bf16
products, autotuned configurations.
"""

import ast
import os

import pytest


if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests_fla/ runs in Triton's interpreter, set up before triton is imported: make test-fla")

from triton.runtime.autotuner import Autotuner  # noqa: E402
from triton.runtime.interpreter import ASTTransformer  # noqa: E402


def take_first_config(self: Autotuner, *args: object, **meta: object) -> list[float]:
    """In the place of a measurement, which needs a driver: every configuration is as quick as the first."""
    return [1.0, 1.0, 1.0]


def tensor_loop_variable(self: ast.NodeTransformer, node: ast.For) -> ast.For:
    """`for i in range(...)`: the interpreter gives Python integers, fla's kernels call methods of tensors on `i`."""
    self.generic_visit(node)
    if isinstance(node.target, ast.Name):
        name = node.target.id
        convert = ast.parse(f"{name} = interpreter_semantic.to_tensor({name}, False)").body
        node.body = [ast.copy_location(statement, node) for statement in convert] + node.body
    return ast.fix_missing_locations(node)


Autotuner._bench = take_first_config
ASTTransformer.visit_For = tensor_loop_variable
