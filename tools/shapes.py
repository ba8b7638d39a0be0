"""Shape comments made true: while tests run, `x = f(y)  # (B, T, C)` in the package is also an assertion.

A letter means one size within one call of one function. An entry may be a letter or word, a number, a product or sum of those (checked
once its letters are known), `_` for any size, or a leading `...`. `a, b = ...  # (B, T), (B, S)` checks two names, and a `return` its value.
"""
import ast
import importlib.machinery
import io
import re
import sys
import tokenize

ENTRY = r"(?:_|\.\.\.|[A-Z0-9][\w ]*(?:[*+/-] ?[\w ]+)*)"
COMMENT = re.compile(rf"#\s*(\({ENTRY}(?:, ?{ENTRY})*,?\)(?:, \({ENTRY}(?:, ?{ENTRY})*,?\))*)")
SHAPE = re.compile(r"\(([^()]*)\)")


def check_shape(value, shape: str, sizes: dict, place: str):
    "`value`, after asserting that its shape is `shape` under the letters known in `sizes`; new letters are learnt."
    names = [n.strip() for n in shape.split(",") if n.strip()]
    if not hasattr(value, "shape"): return value
    actual = tuple(value.shape)
    if names and names[0] == "...": names, actual = names[1:], actual[len(actual) - len(names) + 1:]
    wrong = f"{place} says ({shape}), but the shape is {tuple(value.shape)} with {sizes}"
    assert len(names) == len(actual), wrong
    for name, size in zip(names, actual):
        if name == "_": continue
        if name.isidentifier(): assert sizes.setdefault(name, size) == size, wrong
        elif not set(re.findall(r"[A-Za-z_]\w*", name)) - set(sizes):
            assert eval(name.replace("/", "//"), {}, dict(sizes)) == size, wrong
    return value


class Checks(ast.NodeTransformer):
    "Inserts `check_shape` after commented assignments and around commented return values."
    def __init__(self, source: str, name: str):
        self.name, self.shapes = name, {}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            found = COMMENT.match(token.string) if token.type == tokenize.COMMENT else None
            if found and token.line.strip() != token.string: self.shapes[token.start[0]] = SHAPE.findall(found[1])

    def call(self, value: ast.expr, shape: str, line: int) -> ast.Call:
        place = ast.Constant(f"{self.name}:{line}")
        return ast.Call(ast.Name("_check_shape", ast.Load()), [value, ast.Constant(shape), ast.Name("_sizes", ast.Load()), place], [])

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        empty = ast.parse("_sizes = {}").body
        documented = ast.get_docstring(node) is not None
        node.body[documented:documented] = empty
        return node

    def visit_Assign(self, node):
        shapes = self.shapes.get(node.end_lineno, ())
        targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets[:1]
        names = [t for t in targets if isinstance(t, ast.Name)]
        if not shapes or len(names) != len(targets) or len(shapes) not in (1, len(names)): return node
        if len(shapes) == 1: shapes = shapes * len(names)
        return [node] + [ast.Expr(self.call(ast.Name(n.id, ast.Load()), s, node.lineno)) for n, s in zip(names, shapes)]

    def visit_Return(self, node):
        shapes = self.shapes.get(node.end_lineno, ())
        if node.value is not None and len(shapes) == 1 and not isinstance(node.value, ast.Tuple):
            node.value = self.call(node.value, shapes[0], node.lineno)
        return node


def instrument(source: str, name: str):
    "The code object of a module whose shape comments are assertions."
    tree = Checks(source, name).visit(ast.parse(source))
    future = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    at = tree.body.index(future[-1]) + 1 if future else int(ast.get_docstring(tree) is not None)
    tree.body[at:at] = ast.parse("from tools.shapes import check_shape as _check_shape\n_sizes = {}").body
    return compile(ast.fix_missing_locations(tree), name, "exec", dont_inherit=True)


class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target) if name.startswith("minillm.") else None
        if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader): spec.loader = Loader(name, spec.origin)
        return spec


class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname): return instrument(self.get_source(fullname), self.path)


def install() -> None:
    "Check the shapes of every module of the package imported from now on."
    sys.meta_path.insert(0, Finder)
