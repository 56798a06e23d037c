"""An edit of a module: code in one of its definitions, matched on the syntax tree, is replaced.

Whitespace, line breaks, quotes, comments, redundant parentheses and annotations are ignored. A name such as `__x` in a
pattern matches any expression, the same one wherever it is repeated, and stands for it in the replacement. There `__it`
stands for everything that was matched. So

    Edit("jaxtrain.layers:attention_mask", "__query >= __key", "__query + 1 >= __key")

fits whatever the mask's variables are called and however the line is formatted.
"""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

WILDCARD = re.compile(r"__[a-z]\w*(?<!__)")
MATCHED = "__it"
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_Scope = ast.Module | _Definition
_Bound = dict[str, ast.expr]


@dataclass(frozen=True)
class Edit:
    """In the definition `at`, the only match of `pattern` becomes `replacement`.

    `at` is `module:Class.function`, including the definitions nested in it, or `module` for the code outside its
    definitions. If pattern and replacement are one expression each, the pattern matches wherever a value is read.
    Otherwise both are statements, and the pattern matches consecutive ones. An empty pattern stands for the beginning
    of the definition, after its docstring.
    """

    at: str
    pattern: str
    replacement: str

    @property
    def module(self) -> str:
        """The name of the edited module."""
        return self.at.partition(":")[0]


class PlantError(Exception):
    """An edit does not fit its source."""


def edited(source: str, edits: Iterable[Edit]) -> ast.Module:
    """The syntax tree of `source` with all edits applied in order. Raises PlantError if one does not fit.

    A replacement keeps the line numbers of what it replaces.
    """
    tree = ast.parse(source)
    for edit in edits:
        _apply(edit, tree)
    return tree


def _apply(edit: Edit, tree: ast.Module) -> None:
    scope, (pattern, replacement) = _definition(edit, tree), _pattern_and_replacement(edit)
    if not pattern:
        at = _beginning(scope.body)
        like = scope.body[min(at, len(scope.body) - 1)]
        scope.body[at:at] = _ReplacementFiller(edit, {}, []).all(replacement, like)
        return
    match, bound = _only_match(edit, pattern, scope)
    _NodeReplacer(match, _ReplacementFiller(edit, bound, match).all(replacement, match[0])).visit(scope)


def _definition(edit: Edit, tree: ast.Module) -> _Scope:
    scope: _Scope = tree
    for name in filter(None, edit.at.partition(":")[2].split(".")):
        definitions = [node for node in _definitions(scope) if node.name == name]
        if len(definitions) != 1:
            raise PlantError(
                f"{edit.at}: {name!r} is defined there {len(definitions)} times, not once; for {edit.pattern!r}"
            )
        scope = definitions[0]
    return scope


def _definitions(node: ast.AST) -> Iterator[_Definition]:
    """The definitions in `node`, also under an `if` or a `with`, but not those nested in them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS):
            yield child
        else:
            yield from _definitions(child)


def _pattern_and_replacement(edit: Edit) -> tuple[list[ast.AST], list[ast.AST]]:
    """One expression each, or statements."""
    match _parsed(edit, edit.pattern), _parsed(edit, edit.replacement):
        case [ast.Expr(value)], [ast.Expr(other)]:
            return [value], [other]
        case pattern, replacement:
            return [*pattern], [*replacement]


def _parsed(edit: Edit, text: str) -> list[ast.stmt]:
    try:
        return ast.parse(text).body
    except SyntaxError as error:
        raise PlantError(f"{edit.at}: {text!r} is not Python: {error}") from None


def _beginning(body: Sequence[ast.stmt]) -> int:
    """The index of the first statement after a docstring and `__future__` imports."""
    for at, statement in enumerate(body):
        match statement:
            case ast.Expr(ast.Constant(str())) | ast.ImportFrom(module="__future__"):
                continue
            case _:
                return at
    return len(body)


def _inside(scope: _Scope) -> Iterator[ast.AST]:
    """Every node of a definition; for a module those outside its definitions."""
    todo: list[ast.AST] = [scope]
    while todo:
        node = todo.pop()
        yield node
        outside = (child for child in _children(node) if not isinstance(child, _DEFINITIONS))
        todo += outside if isinstance(scope, ast.Module) else _children(node)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    """All child nodes except annotations."""
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            items = value if isinstance(value, list) else [value]
            yield from (item for item in items if isinstance(item, ast.AST))


def _candidates(scope: _Scope, length: int) -> Iterator[list[ast.AST]]:
    """Every expression, and every `length` consecutive statements of a body."""
    for node in _inside(scope):
        if isinstance(node, ast.expr):
            yield [node]
        for _, body in ast.iter_fields(node):
            if isinstance(body, list) and all(isinstance(item, ast.stmt) for item in body):
                yield from (body[at : at + length] for at in range(len(body) - length + 1))


def _only_match(edit: Edit, pattern: list[ast.AST], scope: _Scope) -> tuple[list[ast.AST], _Bound]:
    matches: list[tuple[list[ast.AST], _Bound]] = []
    for candidate in _candidates(scope, len(pattern)):
        bound: _Bound = {}
        if _matches(pattern, candidate, bound):
            matches.append((candidate, bound))
    if len(matches) != 1:
        raise PlantError(f"{edit.at}: {edit.pattern!r} is there {len(matches)} times, not once")
    return matches[0]


def _matches(pattern: object, node: object, bound: _Bound) -> bool:
    """Whether `node` matches `pattern`; adds what the wildcards stand for to `bound`."""
    match pattern:
        case ast.Name(id=name) if WILDCARD.fullmatch(name):
            if not isinstance(node, ast.expr):
                return False
            # As text: the nodes of a name that is read and of the same name assigned to differ.
            return ast.unparse(bound.setdefault(name, node)) == ast.unparse(node)
        case ast.AST():
            return type(pattern) is type(node) and all(
                _matches(getattr(pattern, field, None), getattr(node, field, None), bound)
                for field in pattern._fields
            )
        case list():
            return (
                isinstance(node, list)
                and len(pattern) == len(node)
                and all(_matches(p, n, bound) for p, n in zip(pattern, node, strict=True))
            )
        case _:
            return type(pattern) is type(node) and pattern == node  # 1, 1.0 and True are equal


class _ReplacementFiller(ast.NodeTransformer):
    """Fills a replacement's wildcards with what they stand for."""

    def __init__(self, edit: Edit, bound: _Bound, matched: Sequence[ast.AST]) -> None:
        self._edit, self._bound, self._matched = edit, bound, matched
        match matched:
            case [ast.expr() as value]:
                self._bound = bound | {MATCHED: value}
            case _:
                pass

    def all(self, replacement: Sequence[ast.AST], like: ast.AST) -> list[Any]:
        """The replacement, filled, with the line numbers of `like`."""
        new: list[Any] = []
        for each in replacement:
            for node in ast.walk(each):
                ast.copy_location(node, like)
            filled = self.visit(each)
            new += filled if isinstance(filled, list) else [filled]
        return new

    def visit_Expr(self, node: ast.Expr) -> ast.AST | list[ast.AST]:
        """`__it` as a statement stands for the matched statements."""
        match node.value, self._matched:
            case ast.Name(id=name), [ast.stmt(), *_] if name == MATCHED:
                return copy.deepcopy([*self._matched])
            case _:
                return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """What a wildcard stands for. Raises PlantError if the pattern does not have it."""
        if not WILDCARD.fullmatch(node.id):
            return node
        if node.id not in self._bound:
            edit = self._edit
            raise PlantError(
                f"{edit.at}: {edit.pattern!r} has no {node.id}, which {edit.replacement!r} names"
            )
        return _in_context(copy.deepcopy(self._bound[node.id]), node.ctx)


def _in_context(node: ast.expr, context: ast.expr_context) -> ast.expr:
    """`node` with the context (load or store) of its new position."""
    match node:
        case ast.Tuple() | ast.List():
            node.ctx = context
            node.elts = [_in_context(element, context) for element in node.elts]
        case ast.Starred():
            node.ctx, node.value = context, _in_context(node.value, context)
        case ast.Name() | ast.Attribute() | ast.Subscript():
            node.ctx = context
        case _:
            pass
    return node


class _NodeReplacer(ast.NodeTransformer):
    """Puts the nodes `new` in place of `old`."""

    def __init__(self, old: Sequence[ast.AST], new: Sequence[ast.AST]) -> None:
        self._new: dict[int, Sequence[ast.AST]] = {id(node): () for node in old} | {id(old[0]): new}

    def visit(self, node: ast.AST) -> Any:
        """An expression becomes one expression, a statement any number of statements."""
        new = self._new.get(id(node))
        if new is None:
            return self.generic_visit(node)
        return new[0] if isinstance(node, ast.expr) else [*new]
