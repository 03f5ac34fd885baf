"""Products of a rewritten variant function (`_variant_source`): what is the same for all scores is multiplied once."""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Collection, Mapping

from pyinfer._variant_operations import FLOAT_FUNCTIONS, FLOAT_PAIR_FUNCTIONS


def call(name: str, *args: ast.expr) -> ast.expr:
    """The expression name(*args)."""
    return ast.Call(ast.Name(name, ast.Load()), list(args), [])


class Substitution(ast.NodeTransformer):
    """An expression in the place of a name."""

    def __init__(self, name: str, expression: ast.expr) -> None:
        self.name, self.expression = name, expression

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.expression) if node.id == self.name else node


class Products(ast.NodeTransformer):
    """Groups the factors of a float32 product that are the same in all calls: the compiler then makes their product once, not for each score.

    Compilers may not, since it rounds otherwise; 1e-7 of a logit is nobody's concern.
    """

    def __init__(self, kinds: Mapping[str, str], uniform: Collection[str]) -> None:
        self.kinds, self.names = kinds, uniform

    def is_float(self, node: ast.expr) -> bool:
        """Whether a value is surely float32 (a product of integers must stay one)."""
        if isinstance(node, ast.Name):
            return self.kinds.get(node.id) == "f32"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            return False
        if node.func.id in ("_add", "_sub", "_mul", "_min", "_max", "_neg", "_abs", "_floordiv", "_mod"):
            return any(self.is_float(a) for a in node.args)
        return node.func.id in ("_f32", *FLOAT_FUNCTIONS, *FLOAT_PAIR_FUNCTIONS)

    def is_uniform(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return (
                node.func.id.startswith("_") and node.func.id != "_load" and all(self.is_uniform(a) for a in node.args)
            )
        return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id in self.names)

    def factors(self, node: ast.expr, below: bool, found: list[tuple[ast.expr, bool]]) -> None:
        """The (factor, whether it divides) of a product."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            name, args = node.func.id, node.args
            if name == "_f32" and self.is_float(args[0]):
                return self.factors(args[0], below, found)
            if name == "_mul" and self.is_float(node):
                self.factors(args[0], below, found)
                return self.factors(args[1], below, found)
            if name == "_divide" and not below:
                self.factors(args[0], below, found)
                return self.factors(args[1], not below, found)
        found.append((node, below))
        return None

    def visit_Call(self, node: ast.Call) -> ast.expr:
        is_product = isinstance(node.func, ast.Name) and node.func.id in ("_mul", "_divide") and self.is_float(node)
        found: list[tuple[ast.expr, bool]] = []
        if is_product:
            self.factors(node, False, found)
        same = [self.is_uniform(f) for f, _ in found]
        if sum(same) < 2 or all(same):
            self.generic_visit(node)
            return node
        groups = []
        for wanted in (False, True):
            parts = [
                (self.visit(f), below) for (f, below), uniform in zip(found, same, strict=True) if uniform == wanted
            ]
            above = [f for f, below in parts if not below] or [ast.Constant(1)]
            product = functools.reduce(lambda x, y: call("_mul", x, y), above)
            under = [f for f, below in parts if below]
            if under:
                divisor = functools.reduce(lambda x, y: call("_mul", x, y), under)
                product = call("_divide", call("_f32", product), call("_f32", divisor))
            groups.append(product)
        own, shared = groups
        if isinstance(own, ast.Call) and isinstance(own.func, ast.Name) and own.func.id == "_tanh2":
            return call(
                "_tanh2_times", own.args[0], call("_f32", shared)
            )  # its last multiplication takes the factor in
        return call("_mul", call("_f32", own), call("_f32", shared))
