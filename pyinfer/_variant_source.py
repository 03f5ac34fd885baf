"""From a user's Python function to one that both backends can compile: every operation becomes a call of `_variant_operations`, every constant a literal.

The result is text that depends on nothing outside itself. It is what the backends compile and what the kernel cache takes for the function's identity.
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from pyinfer._variant_products import Products, Substitution, call
from pyinfer.core.errors import fail
from pyinfer.jit.spec import DeviceFunction

OP = "AttentionVariant"
_BINARY = {
    ast.Add: "_add", ast.Sub: "_sub", ast.Mult: "_mul", ast.FloorDiv: "_floordiv", ast.Mod: "_mod",
    ast.BitAnd: "_and", ast.BitOr: "_or", ast.BitXor: "_xor", ast.LShift: "_shl", ast.RShift: "_shr",
}  # fmt: skip
_COMPARE = {ast.Eq: "_eq", ast.NotEq: "_ne", ast.Lt: "_lt", ast.LtE: "_le", ast.Gt: "_gt", ast.GtE: "_ge"}
_TYPES = {"float": "f32", "int": "i32", "bool": "i32"}  # of annotations
_CALLS = re.compile(r"^# calls (\w+)\((.*)\) -> (\w+)$", re.MULTILINE)
_MAX_INT = 2**31 - 1
_LOG2E = 1 / math.log(2)


@functools.cache
def _known_functions() -> dict[Any, Callable[..., ast.expr]]:
    """What may be called: the function, and what becomes of a call with these (rewritten) arguments."""
    import numpy as np

    def plain(name: str) -> Callable[..., ast.expr]:
        return lambda a: call(name, a)

    def real(name: str) -> Callable[..., ast.expr]:
        return lambda a: call(name, call("_f32", a))

    def whole(name: str) -> Callable[..., ast.expr]:
        return lambda a: call("_i32", call(name, call("_f32", a)))

    def least(name: str) -> Callable[..., ast.expr]:
        return lambda a, b, *more: functools.reduce(lambda x, y: call(name, x, y), (a, b, *more))

    def power(a: ast.expr, b: ast.expr) -> ast.expr:
        return call("_power", call("_f32", a), call("_f32", b))

    found: dict[Any, Callable[..., ast.expr]] = {
        float: plain("_f32"), int: plain("_i32"), bool: plain("_bool"), abs: plain("_abs"), min: least("_min"), max: least("_max"), pow: power,
        math.pow: power, math.floor: whole("_floor"), math.ceil: whole("_ceil"), math.fabs: lambda a: call("_abs", call("_f32", a)),
        np.float32: plain("_f32"), np.int32: plain("_i32"), np.abs: plain("_abs"), np.minimum: least("_min"), np.maximum: least("_max"),
        np.floor: real("_floor"), np.ceil: real("_ceil"), np.power: power,
    }  # fmt: skip

    def exp(a: ast.expr) -> ast.expr:
        return call("_exp2", call("_mul", call("_f32", a), call("_f32", ast.Constant(_LOG2E))))

    def log(a: ast.expr) -> ast.expr:
        return call("_mul", call("_log2", call("_f32", a)), call("_f32", ast.Constant(1 / _LOG2E)))

    def tanh(a: ast.expr) -> ast.expr:
        return call("_tanh2", call("_mul", call("_f32", a), call("_f32", ast.Constant(2 * _LOG2E))))

    found |= {math.exp: exp, np.exp: exp, math.log: log, np.log: log, math.tanh: tanh, np.tanh: tanh}
    for name in ("exp2", "log2", "sqrt", "erf", "sin", "cos", "isnan", "isinf"):
        for module in (math, np):
            function = getattr(module, name, None)  # math.exp2 is from Python 3.11 on, np.erf never was
            if function is not None:
                found[function] = real(f"_{name}")
    return found


def called(source: str) -> list[tuple[str, tuple[str, ...], str]]:
    """(name, argument types, result type) of the user's other functions that a rewritten one calls."""
    return [
        (name, tuple(filter(None, arguments.split(", "))), result) for name, arguments, result in _CALLS.findall(source)
    ]


SCALES = ("before_", "after_")
"""The last arguments of a scaled function: what its first operand is multiplied by, and its result. No name of a user's ends in an underscore there."""


def rewrite(
    hook: str,
    function: Callable[..., Any],
    symbol: str,
    types: Mapping[str, str],
    result: str,
    scaled: str | None = None,
    uniform: frozenset[str] = frozenset(),
) -> tuple[DeviceFunction, ...]:
    """A user's function as the backends compile it, and behind it those that it calls.

    Parameters
    ----------
    hook
        What messages call it ("logits").
    function
        A plain Python function of scalars, or a lambda.
    symbol
        Its name in compiled code.
    types
        The type of every name it may ask for as an argument.
    result
        "f32", or "i32" for a truth value.
    scaled
        The argument that is multiplied by a further argument, as is the result by another (`SCALES`).
    uniform
        Arguments that are the same in all calls of a run.

    Raises
    ------
    ValueError
        Naming the expression and its line, if something in it cannot be compiled.
    """
    function = getattr(function, "py_func", function)  # of a Numba dispatcher
    names = argument_names(hook, function)
    for name in names:
        if name not in types:
            known = ", ".join(types)
            fix = "Name it in `params` if it is a parameter of yours."
            fail(OP, hook, "asks for an argument that does not exist", repr(name), f"any of {known}", fix)
    found: dict[str, DeviceFunction] = {}
    rewriter = _Rewriter(hook, function, found, ())
    rewriter.scaled, rewriter.uniform = scaled, uniform
    rewriter.emit(symbol, {n: types[n] for n in names}, result, truth=result == "i32")
    return tuple(found.values())


def argument_names(hook: str, function: Any) -> list[str]:
    if not inspect.isfunction(function):
        fail(OP, hook, "is no Python function", type(function).__name__, "a function defined with def, or a lambda")
    found = []
    for p in inspect.signature(function).parameters.values():
        if p.kind is not p.POSITIONAL_OR_KEYWORD or p.default is not p.empty:
            fail(OP, hook, "has an argument that cannot be filled", f"'{p}'", "plain names without defaults")
        found.append(p.name)
    return found


def _definition(hook: str, function: Any) -> ast.FunctionDef | ast.Lambda:
    """The syntax tree of a function."""
    try:
        lines, _ = inspect.findsource(
            function
        )  # of the whole file or cell: a lambda's own lines need not be a statement
        tree = ast.parse("".join(lines))
    except (OSError, TypeError, SyntaxError) as error:
        fix = "Write it in a file or a notebook cell."
        fail(
            OP,
            hook,
            "has no source that can be read",
            f"{function.__qualname__} ({error})",
            "a function in a file",
            fix,
        )
    wanted = ast.Lambda if function.__name__ == "<lambda>" else ast.FunctionDef
    first = function.__code__.co_firstlineno
    found: list[Any] = [n for n in ast.walk(tree) if isinstance(n, wanted) and first in (n.lineno, *_decorators(n))]
    if len(found) > 1:  # several on the line: told apart by their code
        own = [_instructions_in(n, function) for n in found]
        if not any(own):  # a lambda of one constant: from Python 3.12 on its instructions are said to come from nowhere
            own = [_same_code(n, function) for n in found]
        found = [n for n, count in zip(found, own, strict=True) if count == max(own) and count]
        found = [
            n for n in found if not any(n is not other and other in ast.walk(n) for other in found)
        ]  # the innermost
    if len(found) != 1:
        wanted_text = "one function that has not been edited since"
        fail(OP, hook, "cannot be found in its file", function.__qualname__, wanted_text, "Write it with def.")
    return found[0]


def _decorators(node: Any) -> list[int]:
    return [d.lineno for d in getattr(node, "decorator_list", ())]


def _instructions_in(node: ast.AST, function: Any) -> int:
    """How many of a lambda's instructions came from a node of its file: tells apart those that begin on one line."""
    code = function.__code__
    if hasattr(code, "co_positions"):  # from Python 3.11 on
        body = node.body  # type: ignore[attr-defined]
        first, last = (body.lineno, body.col_offset), (body.end_lineno, body.end_col_offset)
        return sum(line is not None and first <= (line, column) < last for line, _, column, _ in code.co_positions())
    return _same_code(node, function)


def _same_code(node: ast.AST, function: Any) -> int:
    """1 if a lambda of the file compiles to the function's own instructions."""
    code = function.__code__
    own = compile(ast.Expression(node), "", "eval").co_consts[0]  # type: ignore[arg-type]
    return int((own.co_code, own.co_consts, own.co_names) == (code.co_code, code.co_consts, code.co_names))


class _Rewriter:
    """Rewrites one function; those it calls go into `found` in front of it."""

    def __init__(self, hook: str, function: Any, found: dict[str, DeviceFunction], callers: tuple[Any, ...]) -> None:
        self.hook, self.function, self.found, self.callers = hook, function, found, (*callers, function)
        self.pointers: frozenset[str] = frozenset()
        self.local: set[str] = set()
        self.calls: dict[str, str] = {}
        self.result, self.truth = "f32", False
        self.scaled: str | None = None
        self.uniform: frozenset[str] = frozenset()

    def fail(self, node: Any, what: str, wanted: str) -> NoReturn:
        code = self.function.__code__
        where = f"{code.co_filename}:{getattr(node, 'lineno', code.co_firstlineno)}"
        fail(OP, self.hook, what, f"`{ast.unparse(node)}` ({where})", wanted)

    def emit(self, symbol: str, arguments: Mapping[str, str], result: str, truth: bool) -> None:
        definition = _definition(self.hook, self.function)
        self.result, self.truth = result, truth
        self.pointers = frozenset(n for n, t in arguments.items() if t.endswith("*"))
        self.local = set(arguments)
        if isinstance(definition, ast.Lambda):
            body: list[ast.stmt] = [ast.Return(self.returned(definition.body))]
        else:
            for node in ast.walk(definition):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    self.local.add(node.id)
            body = self.block(definition.body)
        taken = next((n for n in sorted(self.local) if n.startswith(("_", "pyinfer_")) or n in SCALES), None)
        if taken is not None:
            fail(OP, self.hook, "has a name that is taken", repr(taken), "names that do not begin with an underscore")
        stored = {n.id for s in body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        if self.scaled is not None:
            before, after = SCALES
            if self.scaled in arguments:
                product = call("_mul", ast.Name(self.scaled, ast.Load()), ast.Name(before, ast.Load()))
                if self.scaled in stored:
                    body.insert(0, ast.Assign([ast.Name(self.scaled, ast.Store())], product, lineno=0))
                else:
                    body = [Substitution(self.scaled, product).visit(s) for s in body]
            arguments = {**arguments, before: "f32", after: "f32"}
        kinds = {n: t for n, t in arguments.items() if n not in stored}
        regroup = Products(kinds, (self.uniform - stored) | set(SCALES))
        body = [regroup.visit(s) for s in body]
        names = [ast.arg(n) for n in arguments]
        out = ast.FunctionDef(symbol, ast.arguments([], names, None, [], [], None, []), body, [], None, None)
        out.type_params = []  # type: ignore[attr-defined]  # Python 3.12 and newer ask for it
        text = ast.unparse(ast.fix_missing_locations(ast.Module([out], [])))
        lines = [f"# calls {name}{signature}" for name, signature in self.calls.items()]
        self.found[symbol] = DeviceFunction(symbol, "\n".join([*lines, text, ""]), tuple(arguments.values()), result)

    # ---- statements
    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        found = [s for statement in statements for s in self.statement(statement)]
        return found or [ast.Pass()]

    def statement(self, node: ast.stmt) -> list[ast.stmt]:
        if isinstance(node, ast.Return) and node.value is not None:
            return [ast.Return(self.returned(node.value))]
        if isinstance(node, ast.Assign):
            if all(isinstance(t, ast.Name) for t in node.targets):
                return [ast.Assign(node.targets, self.value(node.value), lineno=0)]
            names, values = node.targets[0], node.value
            if len(node.targets) == 1 and isinstance(names, ast.Tuple) and isinstance(values, ast.Tuple):  # a, b = x, y
                plain = all(isinstance(t, ast.Name) for t in names.elts)
                if plain and len(names.elts) == len(values.elts):
                    pair: Any = ast.Tuple([self.value(v) for v in values.elts], ast.Load())
                    return [ast.Assign([names], pair, lineno=0)]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            return [ast.Assign([node.target], self.value(node.value), lineno=0)]
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            both = ast.copy_location(ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value), node)
            return [ast.Assign([node.target], self.value(both), lineno=0)]
        if isinstance(node, ast.If):
            return [
                ast.If(self.condition(node.test), self.block(node.body), self.block(node.orelse) if node.orelse else [])
            ]
        if isinstance(node, ast.While) and not node.orelse:
            return [ast.While(self.condition(node.test), self.block(node.body), [])]
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name) and not node.orelse:
            return [ast.For(node.target, self.range(node.iter), self.block(node.body), [], lineno=0)]
        if isinstance(node, ast.Pass | ast.Break | ast.Continue):
            return [node]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return []  # the docstring
        self.fail(node, "has a statement that cannot be compiled", "assignments, if, while, for over range, return")

    def range(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            outside = node.func.id not in self.local
            if outside and self.resolve(node.func) is range:
                return call("range", *(call("_i32", self.value(a)) for a in node.args))
        self.fail(node, "has a loop that cannot be compiled", "for ... in range(...)")

    def returned(self, node: ast.expr) -> ast.expr:
        if self.truth:
            return call("_i32", self.condition(node))
        value = call(f"_{self.result}", self.value(node))
        return value if self.scaled is None else call("_mul", value, ast.Name(SCALES[1], ast.Load()))

    # ---- expressions
    def condition(self, node: ast.expr) -> ast.expr:
        return call("_bool", self.value(node))

    def value(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Constant):
            return self.constant(node, node.value)
        if isinstance(node, ast.Name):
            if node.id in self.pointers:
                self.fail(node, "uses a tensor as a number", f"an element, {node.id}[index]")
            return node if node.id in self.local else self.constant(node, self.resolve(node))
        if isinstance(node, ast.Attribute):
            return self.constant(node, self.resolve(node))
        if isinstance(node, ast.BinOp):
            return self.binary(node)
        if isinstance(node, ast.UnaryOp):
            return self.unary(node)
        if isinstance(node, ast.BoolOp):
            return ast.BoolOp(node.op, [self.condition(v) for v in node.values])
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            tests: list[ast.expr] = []
            for op, left, right in zip(node.ops, sides[:-1], sides[1:], strict=True):
                if type(op) not in _COMPARE:
                    self.fail(node, "has a comparison that cannot be compiled", "==, !=, <, <=, >, >=")
                tests.append(call(_COMPARE[type(op)], self.value(left), self.value(right)))
            return tests[0] if len(tests) == 1 else ast.BoolOp(ast.And(), tests)
        if isinstance(node, ast.IfExp):
            return ast.IfExp(self.condition(node.test), self.value(node.body), self.value(node.orelse))
        if isinstance(node, ast.Subscript):
            if (
                isinstance(node.value, ast.Name)
                and node.value.id in self.pointers
                and not isinstance(node.slice, ast.Tuple | ast.Slice)
            ):
                return call("_load", ast.Name(node.value.id, ast.Load()), call("_i32", self.value(node.slice)))
            self.fail(node, "has an index that cannot be compiled", "NAME[index] of a parameter declared as '...[:]'")
        if isinstance(node, ast.Call):
            return self.call(node)
        self.fail(node, "has an expression that cannot be compiled", "arithmetic on scalars")

    def constant(self, node: Any, value: Any) -> ast.expr:
        import numpy as np

        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, bool):
            return ast.Constant(value)
        if isinstance(value, int):
            if abs(value) > _MAX_INT:
                self.fail(node, "has a number that does not fit", f"integers up to {_MAX_INT}")
            return ast.Constant(value) if value >= 0 else call("_neg", ast.Constant(-value))
        if isinstance(value, float):
            if math.isnan(value):
                return call("_mul", call("_f32", ast.Constant(math.inf)), ast.Constant(0))
            positive = call("_f32", ast.Constant(abs(value)))
            return positive if math.copysign(1.0, value) > 0 else call("_neg", positive)
        wanted = "numbers, arguments and what is computed from them; other values are parameters (`params`)"
        self.fail(node, f"uses a {type(value).__name__}", wanted)

    def binary(self, node: ast.BinOp) -> ast.expr:
        left, right = self.value(node.left), self.value(node.right)
        if isinstance(node.op, ast.Div):
            return call("_divide", call("_f32", left), call("_f32", right))
        if isinstance(node.op, ast.Pow):
            exponent = node.right.value if isinstance(node.right, ast.Constant) else None
            if type(exponent) is int and 1 <= exponent <= 4:
                return functools.reduce(lambda x, y: call("_mul", x, y), [left] * exponent)
            return call("_power", call("_f32", left), call("_f32", right))
        if type(node.op) not in _BINARY:
            self.fail(node, "has an operator that cannot be compiled", "+ - * / // % ** & | ^ << >>")
        return call(_BINARY[type(node.op)], left, right)

    def unary(self, node: ast.UnaryOp) -> ast.expr:
        if isinstance(node.op, ast.Not):
            return ast.UnaryOp(ast.Not(), self.condition(node.operand))
        operand = self.value(node.operand)
        if isinstance(node.op, ast.USub):
            return call("_neg", operand)
        return (
            operand
            if isinstance(node.op, ast.UAdd)
            else call("_xor", call("_i32", operand), call("_neg", ast.Constant(1)))
        )

    def call(self, node: ast.Call) -> ast.expr:
        if node.keywords or any(isinstance(a, ast.Starred) for a in node.args):
            self.fail(node, "has a call that cannot be compiled", "plain arguments")
        if isinstance(node.func, ast.Name) and node.func.id in self.local:
            self.fail(node, "calls what is no function", "a function")
        function = self.resolve(node.func)
        args = [self.value(a) for a in node.args]
        try:
            known = _known_functions().get(function)
        except TypeError:  # unhashable
            known = None
        if known is not None:
            try:
                return known(*args)
            except TypeError:
                self.fail(node, "has a call with the wrong number of arguments", f"as {function.__name__} takes them")
        function = getattr(function, "py_func", function)
        if not inspect.isfunction(function):
            names = sorted(
                {
                    f"{f.__module__}.{f.__name__}"
                    for f in _known_functions()
                    if getattr(f, "__module__", "") in ("math", "builtins")
                }
            )
            self.fail(
                node,
                "calls a function that cannot be compiled",
                f"a Python function, or {', '.join(names)} (also NumPy's)",
            )
        return self.user_call(node, function, args)

    def user_call(self, node: ast.Call, function: Any, args: list[ast.expr]) -> ast.expr:
        """A function of the user's, compiled by itself: its arguments and result are floats unless annotated otherwise."""
        if function in self.callers:
            self.fail(node, "calls itself", "functions without recursion")
        names = argument_names(self.hook, function)
        if len(names) != len(args):
            self.fail(node, "has a call with the wrong number of arguments", f"{len(names)}")
        types = [self.annotated(node, function, n) for n in names]
        result = self.annotated(node, function, "return")
        truth = function.__annotations__.get("return") in (bool, "bool")
        inner = _Rewriter(self.hook, function, {}, self.callers)
        inner.emit("f", dict(zip(names, types, strict=True)), result, truth)
        text = inner.found["f"].source
        name = re.sub(r"\W", "", function.__name__)
        symbol = f"pyinfer_user_{name}_{hashlib.sha256(repr((text, types)).encode()).hexdigest()[:12]}"
        if symbol not in self.found:
            _Rewriter(self.hook, function, self.found, self.callers).emit(
                symbol, dict(zip(names, types, strict=True)), result, truth
            )
        self.calls[symbol] = f"({', '.join(types)}) -> {result}"
        made = call(symbol, *(call(f"_{t}", a) for t, a in zip(types, args, strict=True)))
        return call("_bool", made) if truth else made

    def annotated(self, node: Any, function: Any, name: str) -> str:
        annotation = function.__annotations__.get(name, float)
        known = _TYPES.get(annotation if isinstance(annotation, str) else getattr(annotation, "__name__", ""))
        if known is None:
            self.fail(node, f"calls a function with the annotation {annotation!r}", "float, int or bool")
        return known

    def resolve(self, node: ast.expr) -> Any:
        """The value of a name outside the function, or of an attribute of one."""
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            if not hasattr(owner, node.attr):
                self.fail(node, "uses a name that does not exist", "a constant or a function")
            return getattr(owner, node.attr)
        if not isinstance(node, ast.Name) or node.id in self.local:
            self.fail(node, "has an expression that cannot be compiled", "arithmetic on scalars")
        function = self.function
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name == node.id:
                try:
                    return cell.cell_contents
                except ValueError:
                    self.fail(node, "uses a name that has no value yet", "a constant or a function")
        if node.id in function.__globals__:
            return function.__globals__[node.id]
        if hasattr(builtins, node.id):
            return getattr(builtins, node.id)
        self.fail(node, "uses a name that does not exist", "an argument, a constant or a function")
