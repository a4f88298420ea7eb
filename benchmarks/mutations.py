"""Small changes of a source text that somebody could make by mistake: what `benchmarks.mutants` draws from.

mutmut 3 and cosmic-ray have operators of their own. Neither drops a statement, a `finally`, a context manager or a
decorator, swaps arguments or changes a dtype, which is what a numerical library gets wrong unseen; mutmut changes no
code outside functions and every word of a message. So these are written on `ast`, and leave prose alone.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

_COMPARISONS = {
    ast.Lt: ("<=", ">="), ast.LtE: ("<", ">"), ast.Gt: (">=", "<="), ast.GtE: (">", "<"), ast.Eq: ("!=",),
    ast.NotEq: ("==",), ast.Is: ("is not",), ast.IsNot: ("is",), ast.In: ("not in",), ast.NotIn: ("in",),
}  # fmt: skip
_ARITHMETIC = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "/", ast.Mod: "//", ast.Pow: "*",
    ast.BitAnd: "|", ast.BitOr: "&",
}  # fmt: skip
_OPPOSITE = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor"}
_DTYPES = {
    "float64": "float32", "float32": "bfloat16", "bfloat16": "float16", "float16": "bfloat16", "int64": "int32",
    "double": "float", "float": "bfloat16", "long": "int",
}  # fmt: skip
_DECORATORS_THAT_ARE_SYNTAX = {"property", "staticmethod", "classmethod", "dataclass", "contextmanager", "overload"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: Within `lora_init`.
        line: Where the change begins, from 1.
        kind: The operator.
        before: The text that is replaced.
        after: What replaces it.
        start: Where it stands, in bytes.
        ran_by: First and last line; who runs one of these runs the change.
        imported: Whether it runs as the file is imported, whoever calls what it defines.
    """

    file: str
    line: int
    kind: str
    before: str
    after: str
    start: int
    ran_by: tuple[int, int]
    imported: bool

    def applied(self, text: str) -> str:
        """Return the changed text."""
        raw, before = text.encode(), self.before.encode()
        assert raw[self.start : self.start + len(before)] == before
        return (raw[: self.start] + self.after.encode() + raw[self.start + len(before) :]).decode()


def mutants(root: Path, file: str) -> list[Mutant]:
    """Return all changes of a file. Some compile to the same program, or not at all: see `differs`."""
    finder = _Finder(file, (root / file).read_text(encoding="utf-8"))
    finder.visit(finder.tree)
    return [*dict.fromkeys(finder.found)]


def differs(mutant: Mutant, text: str) -> bool:
    """Return whether the change compiles and makes another program."""
    try:
        return ast.dump(ast.parse(mutant.applied(text))) != ast.dump(ast.parse(text))
    except SyntaxError:
        return False


class _Finder(ast.NodeVisitor):
    """Walk a file with the functions and statements around each node."""

    def __init__(self, file: str, text: str) -> None:
        self.file, self.raw, self.tree = file, text.encode(), ast.parse(text)
        self.starts = [0]
        for line in self.raw.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutant] = []
        self.functions: list[ast.AST] = []
        self.statements: list[ast.stmt] = []
        self.header: ast.AST | None = None  # the function whose defaults or decorators are looked at

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            if self._is_left_alone(node):
                return
            self.statements.append(node)
        for base in type(node).__mro__:
            if change := getattr(self, f"change_{base.__name__}", None):
                change(node)
        self.generic_visit(node)
        if isinstance(node, ast.stmt):
            self.statements.pop()

    @staticmethod
    def _is_left_alone(node: ast.stmt) -> bool:
        """Leave docstrings, imports, `__all__` and what only type checkers read."""
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            return True
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return True
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return True
        return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, _FUNCTIONS):
            self._visit_function(node)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                self.visit(node.value)
            if ast.unparse(node.annotation).startswith("Annotated["):  # which carries constraints
                self.visit(node.annotation.slice)
        elif not isinstance(
            node, (ast.JoinedStr, ast.arg)
        ):  # where nodes of an f-string stand, Python 3.11 does not say
            super().generic_visit(node)

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer, self.header = self.header, node
        for default in [*node.args.defaults, *node.args.kw_defaults, *node.decorator_list]:
            if default is not None:
                self.visit(default)
        self.header = outer
        self.functions.append(node)
        for statement in node.body:
            self.visit(statement)
        self.functions.pop()

    # Where a change stands.

    def _offset(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def _text(self, node: ast.expr | ast.stmt) -> str:
        start = self._offset(node.lineno, node.col_offset)
        return self.raw[start : self._offset(node.end_lineno or 0, node.end_col_offset or 0)].decode()

    def _replace(self, kind: str, first: ast.AST, last: ast.AST, after: str) -> None:
        """Replace the text from the one node to the end of the other."""
        start = self._offset(first.lineno, first.col_offset)  # type: ignore[attr-defined]
        end = self._offset(last.end_lineno, last.end_col_offset)  # type: ignore[attr-defined]
        self._note(kind, first.lineno, start, end, after)  # type: ignore[attr-defined]

    def _note(
        self, kind: str, line: int, start: int, end: int, after: str, ran_by: tuple[int, int] | None = None
    ) -> None:
        before = self.raw[start:end].decode()
        imported = not self.functions
        if ran_by is None:
            ran_by = self._ran_by(line)
        if self.header is not None:
            body = self.header.body  # type: ignore[attr-defined]
            ran_by, imported = (body[0].lineno, body[-1].end_lineno), False
        self.found.append(Mutant(self.file, line, kind, before, after, start, ran_by, imported))

    def _ran_by(self, line: int) -> tuple[int, int]:
        statement = self.statements[-1]
        body = getattr(statement, "body", None)
        if not body:
            return statement.lineno, statement.end_lineno or statement.lineno
        if isinstance(statement, ast.Try):
            return line, line
        return statement.lineno, max(statement.lineno, body[0].lineno - 1)

    # The operators.

    def change_Compare(self, node: ast.Compare) -> None:
        for number, operator in enumerate(node.ops):
            left = [node.left, *node.comparators][number]
            right = node.comparators[number]
            for after in _COMPARISONS[type(operator)]:
                self._replace("comparison", left, right, f"{self._text(left)} {after} {self._text(right)}")

    def change_BinOp(self, node: ast.BinOp) -> None:
        if after := _ARITHMETIC.get(type(node.op)):
            self._replace("arithmetic", node, node, f"{self._grouped(node.left)} {after} {self._grouped(node.right)}")

    def _grouped(self, node: ast.expr) -> str:
        return f"({self._text(node)})" if isinstance(node, (ast.BinOp, ast.BoolOp, ast.IfExp)) else self._text(node)

    def change_UnaryOp(self, node: ast.UnaryOp) -> None:
        kind = "boolean" if isinstance(node.op, ast.Not) else "arithmetic"
        self._replace(kind, node, node, self._text(node.operand))

    def change_AugAssign(self, node: ast.AugAssign) -> None:
        if after := _ARITHMETIC.get(type(node.op)):
            self._replace("arithmetic", node, node, f"{self._text(node.target)} {after}= {self._text(node.value)}")
        self._replace("statement", node, node, "pass")

    def change_BoolOp(self, node: ast.BoolOp) -> None:
        parts = [self._grouped(value) for value in node.values]
        other = " and " if isinstance(node.op, ast.Or) else " or "
        self._replace("boolean", node, node, f"({other.join(parts)})")
        own = " or " if isinstance(node.op, ast.Or) else " and "
        for left_out in range(len(parts)):
            rest = own.join(part for number, part in enumerate(parts) if number != left_out)
            self._replace("boolean", node, node, f"({rest})")

    def change_If(self, node: ast.If) -> None:
        for after in ("True", "False"):
            self._replace("boolean", node.test, node.test, after)

    def change_IfExp(self, node: ast.IfExp) -> None:
        for after in ("True", "False"):
            self._replace("boolean", node.test, node.test, after)

    def change_comprehension(self, node: ast.comprehension) -> None:
        for condition in node.ifs:
            self._replace("boolean", condition, condition, "True")

    def change_Constant(self, node: ast.Constant) -> None:
        if (after := _other(node.value)) is not None:
            statement = self.statements[-1]
            of_class = isinstance(statement, ast.AnnAssign) and len(self.statements) > 1 and not self.functions
            kind = "default" if self.header is not None or of_class else "constant"
            self._replace(kind, node, node, after)

    def change_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                comma = self.raw[self._offset(value.end_lineno or 0, value.end_col_offset or 0) :].lstrip()[:1] == b","
                if comma:
                    self._drop("key", key, value)

    def change_Name(self, node: ast.Name) -> None:
        if node.id in _OPPOSITE and isinstance(node.ctx, ast.Load):
            self._replace("arithmetic", node, node, _OPPOSITE[node.id])

    def change_Attribute(self, node: ast.Attribute) -> None:
        other = _DTYPES.get(node.attr) or _OPPOSITE.get(node.attr)
        if other and isinstance(node.ctx, ast.Load):
            kind = "dtype" if node.attr in _DTYPES else "arithmetic"
            self._replace(kind, node, node, f"{self._text(node.value)}.{other}")

    def change_Call(self, node: ast.Call) -> None:
        """Drop an argument or swap two, unless every run would fail at once: the only one, or a type for its value."""
        if ast.unparse(node.func) in ("isinstance", "issubclass", "getattr", "hasattr", "setattr", "zip", "map"):
            return
        for word in [*(node.args[-1:] if len(node.args) > 1 else []), *node.keywords]:
            if not _is_prose(word):
                self._drop("argument", word, word)
        for one, two in zip(node.args, node.args[1:], strict=False):
            if not any(isinstance(word, ast.Starred) or _is_prose(word) for word in (one, two)):
                self._replace("argument", one, two, f"{self._text(two)}, {self._text(one)}")

    def _drop(self, kind: str, first: ast.AST, last: ast.AST) -> None:
        """Remove it with the comma behind it, else with the one before."""
        start = self._offset(first.lineno, first.col_offset)  # type: ignore[attr-defined]
        end = self._offset(last.end_lineno, last.end_col_offset)  # type: ignore[attr-defined]
        behind = self.raw[end:].lstrip()
        if behind[:1] == b",":
            end = len(self.raw) - len(behind[1:].lstrip(b" "))
        else:
            ahead = self.raw[:start].rstrip()
            start = len(ahead) - 1 if ahead[-1:] == b"," else start
        self._note(kind, first.lineno, start, end, "")  # type: ignore[attr-defined]

    def change_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, (ast.Yield, ast.YieldFrom)):
            self._replace("statement", node, node, "pass")

    def change_Raise(self, node: ast.Raise) -> None:
        self._replace("statement", node, node, "pass")

    def change_Delete(self, node: ast.Delete) -> None:
        self._replace("statement", node, node, "pass")

    def change_Continue(self, node: ast.Continue) -> None:
        self._replace("statement", node, node, "pass")
        self._replace("statement", node, node, "break")

    def change_Break(self, node: ast.Break) -> None:
        self._replace("statement", node, node, "pass")

    def change_Assign(self, node: ast.Assign) -> None:
        """Drop what sets an attribute or an item, or a name that has a value already."""
        names = [one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)]
        if not self.functions or isinstance(node.targets[0], ast.Tuple):
            return
        if not isinstance(node.targets[0], ast.Name) or self._is_bound_twice(names[0]):
            self._replace("statement", node, node, "pass")

    def _is_bound_twice(self, name: str) -> bool:
        function = self.functions[-1]
        nodes = list(ast.walk(function))
        stored = sum(isinstance(one, ast.Name) and one.id == name and isinstance(one.ctx, ast.Store) for one in nodes)
        return stored + sum(isinstance(one, ast.arg) and one.arg == name for one in nodes) > 1

    def change_Try(self, node: ast.Try) -> None:
        """Drop what `finally` does, or do it only if nothing was raised."""
        if not node.finalbody:
            return
        first, last = node.finalbody[0], node.finalbody[-1]
        ran_by = (first.lineno, last.end_lineno or first.lineno)
        start = self._offset(first.lineno, first.col_offset)
        end = self._offset(last.end_lineno or 0, last.end_col_offset or 0)
        self._note("restore", first.lineno, start, end, "pass", ran_by)
        if not node.handlers:
            word = self.raw.rindex(b"finally:", 0, start)
            indent = " " * node.col_offset
            after = f"except ZeroDivisionError:\n{indent}    raise\n{indent}else:"
            line = self.raw[:word].count(b"\n") + 1
            self._note("restore", line, word, word + len(b"finally:"), after, ran_by)

    def change_With(self, node: ast.With) -> None:
        for item in node.items:
            if item.optional_vars is None:
                self._replace("restore", item.context_expr, item.context_expr, "__import__('contextlib').nullcontext()")

    def change_FunctionDef(self, node: ast.FunctionDef) -> None:
        for decorator in node.decorator_list:
            name = ast.unparse(decorator).partition("(")[0].rpartition(".")[2]
            if name not in _DECORATORS_THAT_ARE_SYNTAX and name != "setter":
                self.header = node
                self._replace("statement", decorator, decorator, "(lambda function: function)")
                self.header = None


def _is_prose(node: ast.AST) -> bool:
    if isinstance(node, ast.keyword):
        return _is_prose(node.value)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and " " in str(node.value))


def _other(value: object) -> str | None:
    """Return another constant in its place. Prose has none, nor have None and `...`."""
    if isinstance(value, bool):
        return repr(not value)
    if isinstance(value, int):
        return repr(value + 1)
    if isinstance(value, float):
        return repr(value * 2 or 1.0)
    if isinstance(value, str) and value and not any(letter.isspace() for letter in value):
        return repr(f"{value}X")
    return None
