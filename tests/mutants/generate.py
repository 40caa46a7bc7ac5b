"""Source mutants of the kernel files: one small fault each, made from the syntax tree.

All functions of a module in `kernels/` are mutated, kernels and launchers alike. What no test on
numbers can see (warps, stages, hints to the compiler, types in signatures) is left alone.
"""

import ast
import copy
import hashlib
import importlib.util
import itertools
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sparsekern import kernels

FOLDER = Path(kernels.__file__).parent
# keywords whose value changes how a kernel is compiled, not what it says
_TUNING = ("num_warps", "num_stages", "enable_fp_fusion", "input_precision", "PRECISION")
_HINTS = ("tl.max_contiguous", "tl.multiple_of", "tl.assume")
# functions that decide nothing in the interpreter
_COMPILED_ONLY = ("_key", "_kernel_of")
_ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mod}
_COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
_ARITHMETIC[ast.Mod] = ast.FloorDiv
_COMPARE |= {ast.Gt: ast.GtE, ast.GtE: ast.Gt}
_SWAPPED = {"sxm": "sxk", "sxk": "sxm", "sym": "syn", "syn": "sym", "min": "max", "max": "min"}
_SIZES = {"M": ("N", "K"), "N": ("M", "K"), "K": ("N", "M"), "R": ("C", "M"), "C": ("R", "K")}


class Mutant(NamedTuple):
    """One fault: where it is, what the source said, and what it says now."""

    module: str
    function: str
    operator: str
    old: str
    new: str
    statement: str  # first line of the statement that holds it
    number: int  # among all mutants of the module

    @property
    def name(self):
        """Readable test id."""
        what = "".join(ch if ch.isalnum() else "_" for ch in f"{self.old}"[:40]).strip("_")
        return f"{self.module}-{self.number}-{self.function}-{self.operator}-{what}"

    def __str__(self):
        return (
            f"{self.module}.{self.function}: {self.operator}\n  in    {self.statement}\n"
            f"  was   {self.old}\n  now   {self.new}"
        )


def modules():
    """Names of the modules with kernels that the interpreter runs."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if "@triton.jit" in p.read_text())


def _bin(node, op):
    return ast.BinOp(node.left, op(), node.right)


def _binary(node):
    if not isinstance(node, ast.BinOp):
        return
    if type(node.op) in _ARITHMETIC:
        yield "arithmetic", _bin(node, _ARITHMETIC[type(node.op)])
    if isinstance(node.op, ast.BitAnd):
        yield "conjunct dropped", node.left
        yield "conjunct dropped", node.right


def _compare(node):
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARE:
        yield (
            "comparison",
            ast.Compare(node.left, [_COMPARE[type(node.ops[0])]()], node.comparators),
        )
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            yield (
                "condition dropped",
                ast.BoolOp(node.op, [v for v in node.values if v is not value]),
            )


def _constant(node):
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value in (0, 1, 2):
        for value in {0: (1,), 1: (0, 2), 2: (1,)}[node.value]:
            yield "constant", ast.Constant(value)


def _without(call, *names):
    return ast.Call(call.func, call.args, [k for k in call.keywords if k.arg not in names])


def _memory(node):
    """Masks and fillings of loads and stores."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("tl.load", "tl.store"):
        return
    names = {k.arg for k in node.keywords}
    if "other" in names:
        yield "other dropped", _without(node, "other")
    if "mask" in names:
        yield "mask dropped", _without(node, "mask", "other")


def _types(node):
    text = ast.unparse(node)
    if isinstance(node, ast.Call) and text.endswith(".to(tl.int64)"):
        yield "int64 dropped", node.func.value
    if isinstance(node, ast.Call) and text.startswith("tl.zeros"):
        half = ast.parse("tl.float16", mode="eval").body
        yield "accumulator fp16", ast.Call(node.func, node.args, [ast.keyword("dtype", half)])


def _calls(node):
    """Calls that are left out, ranges cut short, neighbouring arguments swapped."""
    if not isinstance(node, ast.Call):
        return
    name, args = ast.unparse(node.func), node.args
    if name == "tl.where":
        yield "where dropped", args[1]
    if name == "tl.trans":
        yield "transpose dropped", args[0]
    if name == "tl.dot":
        yield "accumulator lost", ast.Call(node.func, args[:2], node.keywords)
    if name == "range" and len(args) == 3:
        short = ast.BinOp(args[1], ast.Sub(), args[2])
        yield "last iteration lost", ast.Call(node.func, [args[0], short, args[2]], [])
    if "_kernel" in name:
        for i in range(len(args) - 1):
            swapped = [*args[:i], args[i + 1], args[i], *args[i + 2 :]]
            yield "arguments swapped", ast.Call(node.func, swapped, node.keywords)


def _names(node, parameters):
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        other = _SWAPPED.get(node.id)
        if other in parameters or other in ("min", "max"):
            yield "name swapped", ast.Name(other, ast.Load())
        for size in _SIZES.get(node.id, ()):
            if size in parameters:
                yield "size swapped", ast.Name(size, ast.Load())
                break
    if isinstance(node, ast.Attribute) and node.attr == "T":
        yield "transpose dropped", node.value


def _branches(node):
    if isinstance(node, ast.IfExp):
        yield "branch fixed", node.body
        yield "branch fixed", node.orelse
    if isinstance(node, ast.If):
        yield "condition negated", ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
        yield "sum negated", ast.AugAssign(node.target, ast.Sub(), node.value)
        yield "statement dropped", ast.Pass()


def _grid(node):
    """One program fewer along an axis."""
    value = node.value if isinstance(node, ast.Assign | ast.Subscript) else None
    target = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
    grid = node.slice if isinstance(node, ast.Subscript) else value
    launches = target == "grid" or (value is not None and "_kernel" in ast.unparse(value)[-12:])
    if not launches or not isinstance(grid, ast.Tuple):
        return
    for i, size in enumerate(grid.elts):
        less = [*grid.elts]
        less[i] = ast.BinOp(size, ast.Sub(), ast.Constant(1))
        less = ast.Tuple(less, ast.Load())
        if isinstance(node, ast.Assign):
            yield "grid smaller", ast.Assign(node.targets, less)
        else:
            yield "grid smaller", ast.Subscript(node.value, less, ast.Load())


def _faults(node, parameters):
    """(operator, replacement) of every fault that starts at a node."""
    plain = (_binary, _compare, _constant, _memory, _types, _calls, _branches, _grid)
    yield from itertools.chain.from_iterable(make(node) for make in plain)
    yield from _names(node, parameters)


def _places(node, statement=None):
    """(parent, field, index, node, statement) below a node, where faults can be seen."""
    for field, value in ast.iter_fields(node):
        if isinstance(node, ast.FunctionDef) and field != "body":
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or _invisible(child):
                continue
            inside = child if isinstance(child, ast.stmt) else statement
            yield node, field, index if isinstance(value, list) else None, child, inside
            yield from _places(child, inside)


def _invisible(node):
    if isinstance(node, ast.keyword):
        return node.arg in _TUNING or node.arg == "other"
    if isinstance(node, ast.If) and ast.unparse(node.test) == "INTERPRET":
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    return isinstance(node, ast.Call) and ast.unparse(node.func) in _HINTS


def _set(parent, field, index, value):
    if index is None:
        setattr(parent, field, value)
    else:
        getattr(parent, field)[index] = value


def _first_line(node):
    return ast.unparse(node).splitlines()[0]


def _applied(module):
    """Every mutant of a module, in the order of its source, and the tree while it holds it."""
    tree = ast.parse((FOLDER / f"{module}.py").read_text())
    number, lines = itertools.count(), {}
    functions = (f for f in tree.body if isinstance(f, ast.FunctionDef))
    for function in (f for f in functions if f.name not in _COMPILED_ONLY):
        parameters = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
        for parent, field, index, node, statement in list(_places(function)):
            if statement not in lines:
                lines[statement] = _first_line(statement)
            for operator, fault in list(_faults(node, parameters)):
                new = ast.fix_missing_locations(ast.copy_location(copy.deepcopy(fault), node))
                texts = _first_line(node), _first_line(new), lines[statement]
                _set(parent, field, index, new)
                yield Mutant(module, function.name, operator, *texts, next(number)), tree
                _set(parent, field, index, node)


def mutants(module):
    """Every mutant of a module, in the order of its source."""
    return [mutant for mutant, _ in _applied(module)]


def chosen(module, limit):
    """At most so many mutants of a module, of all operators alike.

    Which of an operator's mutants are taken depends on their own text alone, so that an edit
    elsewhere changes nothing.
    """
    groups = {}
    for mutant in mutants(module):
        groups.setdefault(mutant.operator, []).append(mutant)
    for group in groups.values():
        group.sort(key=lambda m: hashlib.sha1(repr(m[:6]).encode()).digest())
    turns = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
    taken = itertools.islice((m for m in turns if m is not None), limit)
    return sorted(taken, key=lambda m: m.number)


def load_tree(tree, name, folder):
    """A syntax tree as a module of `sparsekern.kernels`, beside the right ones."""
    path = Path(folder) / f"{name}.py"
    path.write_text(ast.unparse(tree))  # the interpreter reads the source of what it runs
    spec = importlib.util.spec_from_file_location(f"sparsekern.kernels.mutant_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(mutant, folder):
    """The mutated module."""
    tree = next(tree for other, tree in _applied(mutant.module) if other == mutant)
    return load_tree(tree, f"{mutant.module}_{mutant.number}", folder)


@contextmanager
def swapped_in(right, wrong):
    """Give every module that holds a function of `right` the one of `wrong` by the same name."""
    functions = {
        id(f): getattr(wrong, name)
        for name, f in vars(right).items()
        if callable(f) and getattr(getattr(f, "fn", f), "__module__", None) == right.__name__
    }
    taken = []
    for name, module in list(sys.modules.items()):
        if name.startswith("sparsekern"):
            for key, value in list(vars(module).items()):
                if id(value) in functions:
                    taken.append((module, key, value))
                    setattr(module, key, functions[id(value)])
    try:
        yield
    finally:
        for module, key, value in taken:
            setattr(module, key, value)
