"""Jinja's sandbox with a budget: a template of a stranger ends, in memory that it cannot choose.

Jinja's own sandbox guards Python's internals and the length of a range. It bounds neither nested loops nor
the size of a value (`'a' * 10**10`, a text joined to itself forty times), nor what a filter makes of a
number. Here all that repeats or grows takes steps from a budget, before it happens:

* the body of a loop or macro, each time it runs: `_Charging` writes that into the parsed template;
* operators, comparisons, calls, filters and outputs, for what they read and make, however often one value
  refers to another.

What cannot be bounded so is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lora.data.template_budget import BUDGET, ITEM, OPERATION, Budget
from lora.data.template_growth import spend_filter, spend_method, spend_operator

MAX_SOURCE = 200_000  # characters of a template
# filters that nodes are rewritten to, and that no template can spell
CHARGE, JOINED, SLICED, COMPARED = "charge", "~", "[:]", "=="

# what Jinja's filters read: the value alone, its items one by one as they are asked for, or all to the end
_CHEAP = (
    "abs attr count d default filesizeformat first float int items last length list random reverse safe",
)
_LAZY = ("map reject rejectattr select selectattr",)
_WHOLE = (
    "batch capitalize center dictsort e escape forceescape format groupby indent join lower max min replace",
    "round slice sort string sum title trim truncate unique upper urlencode wordcount",
)
_COMPARING = ("!= < <= == > >= eq equalto ge greaterthan gt in le lessthan lt lower ne upper",)


def _names(lines: Sequence[str]) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split())


CHEAP_FILTERS, LAZY_FILTERS, WHOLE_FILTERS = _names(_CHEAP), _names(_LAZY), _names(_WHOLE)
COMPARING_TESTS = _names(_COMPARING)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """An environment whose templates are given a new `Budget` as their variable `BUDGET`.

    `context.parent` holds what a template was given; nothing that it sets itself can stand before it.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options: Any) -> None:
        # folding constants while compiling would run parts of a template before it has a budget
        super().__init__(optimized=False, finalize=_output, **options)
        del self.globals["lipsum"]
        self.globals["namespace"] = _OpaqueNamespace
        bounded = CHEAP_FILTERS | LAZY_FILTERS | WHOLE_FILTERS
        self.filters = {name: _bounded_filter(name) for name in bounded}
        self.filters |= {CHARGE: _charge, JOINED: _joined, SLICED: _sliced, COMPARED: _output}
        self.tests |= {name: _bounded_test(name) for name in COMPARING_TESTS}

    def bounded_template(self, source: str) -> jinja2.Template:
        """Compile `source`.

        Raises:
            SecurityError: it is too long.
            jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError: it is not a template,
                or nested too deeply.
        """
        if len(source) > MAX_SOURCE:
            raise SecurityError(f"expected at most {MAX_SOURCE:,} characters, found {len(source):,}")
        return self.from_string(_Charging().visit(self.parse(source)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return `left operator right`, charged by what it makes."""
        budget: Budget = context.parent[BUDGET]
        budget.spend(OPERATION)
        spend_operator(budget, operator, left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, callee: Any, /, *arguments: Any, **named: Any) -> Any:
        """Call a macro, a method or a global, charged by its arguments and by what it makes."""
        budget: Budget = context.parent[BUDGET]
        budget.spend(OPERATION + ITEM * (len(arguments) + len(named)))
        method = getattr(callee, "__wrapped__", callee)  # Jinja wraps str.format
        owner = getattr(method, "__self__", None)
        if owner is not None:
            arguments = tuple(
                list(budget.counted(argument)) if isinstance(argument, Iterator) else argument
                for argument in arguments
            )
            # Jinja's own begin with an underscore
            given = (*arguments, *(value for name, value in named.items() if not name.startswith("_")))
            budget.read(*given)
            spend_method(budget, owner, method.__name__, given)
        return budget.made(super().call(context, callee, *arguments, **named))


class _OpaqueNamespace(Namespace):
    # as text, a namespace would show values that were charged once and may be shared many times
    __repr__ = object.__repr__


class _Charging(NodeTransformer):
    """Writes charges into a parsed template."""

    def get_visitor(self, node: nodes.Node) -> Any:
        rewrite = _REWRITES.get(type(node))
        return None if rewrite is None else lambda node: rewrite(self.generic_visit(node))


def _charge_loop(node: nodes.For) -> nodes.Node:
    if node.test is not None:
        # rows that the test leaves out do not reach the body
        node.test = nodes.And(_charge_of([node.test]), node.test)
    return _charge_body(node)


def _charge_body(node: Any) -> nodes.Node:
    cost = _charge_of([*node.body, *getattr(node, "defaults", ())])
    node.body.insert(0, nodes.ExprStmt(cost, lineno=node.lineno))
    return node


def _charge_concatenation(node: nodes.Concat) -> nodes.Node:
    return _filtered(nodes.List(node.nodes, lineno=node.lineno), JOINED)


def _charge_comparison(node: nodes.Compare) -> nodes.Node:
    for side in (node, *node.ops):
        if not isinstance(side.expr, nodes.Const):
            side.expr = _filtered(side.expr, COMPARED)
    return node


def _charge_slice(node: nodes.Getitem) -> nodes.Node:
    if not isinstance(node.arg, nodes.Slice):
        return node
    ends = [end or nodes.Const(None) for end in (node.arg.start, node.arg.stop, node.arg.step)]
    return _filtered(node.node, SLICED, ends)


_REWRITES: dict[type[nodes.Node], Callable[[Any], nodes.Node]] = {
    nodes.For: _charge_loop,
    nodes.Macro: _charge_body,
    nodes.CallBlock: _charge_body,
    nodes.Block: _charge_body,
    nodes.Concat: _charge_concatenation,
    nodes.Compare: _charge_comparison,
    nodes.Getitem: _charge_slice,
}


def _filtered(node: nodes.Expr, name: str, arguments: Sequence[nodes.Expr] = ()) -> nodes.Expr:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


def _charge_of(body: Sequence[nodes.Node]) -> nodes.Expr:
    """Return a true expression that takes the steps of `body`, every branch and each loop in it once."""
    steps, stack = OPERATION, list(body)
    while stack:
        node = stack.pop()
        stack.extend(node.iter_child_nodes())
        text = getattr(node, "data" if isinstance(node, nodes.TemplateData) else "value", None)
        steps += 1 + (len(text) if isinstance(text, str) else 0)
    return _filtered(nodes.Const(steps, lineno=1), CHARGE)


@pass_context
def _charge(context: Context, steps: int) -> bool:
    context.parent[BUDGET].spend(steps)
    return True


@pass_context
def _output(context: Context, value: Any) -> Any:
    if type(value) is str:  # what nearly all of them are
        context.parent[BUDGET].spend(ITEM + len(value))
    elif value is not None and type(value) is not bool:
        context.parent[BUDGET].read(value)
    return value


@pass_context
def _joined(context: Context, parts: list[Any]) -> str:
    context.parent[BUDGET].read(parts)
    return "".join(map(str, parts))


@pass_context
def _sliced(context: Context, value: Any, start: Any, stop: Any, step: Any) -> Any:
    return context.parent[BUDGET].made(value[start:stop:step])


# runs the filters and tests themselves
_PLAIN = ImmutableSandboxedEnvironment()


def _bounded_filter(name: str) -> Callable[..., Any]:
    @pass_context
    def bounded(context: Context, value: Any, *arguments: Any, **named: Any) -> Any:
        budget: Budget = context.parent[BUDGET]
        budget.spend(OPERATION)
        if name in LAZY_FILTERS:
            value = budget.counted(value)
        elif isinstance(value, Iterator) and (name in WHOLE_FILTERS or name == "list"):
            value = list(budget.counted(value))
        if name in WHOLE_FILTERS:
            given = (*arguments, *named.values())
            budget.read(value, *given)
            spend_filter(budget, name, value, given)
        else:
            budget.made(value)
        return budget.made(_PLAIN.call_filter(name, value, arguments, named, context, context.eval_ctx))

    return bounded


def _bounded_test(name: str) -> Callable[..., bool]:
    @pass_context
    def bounded(context: Context, value: Any, *arguments: Any) -> bool:
        context.parent[BUDGET].read(value, *arguments)
        return _PLAIN.call_test(name, value, arguments, {}, context, context.eval_ctx)

    return bounded
