"""The curves of a divergence as the source of a Triton function.

`kernels.weighted` is traced once: a graph of element-wise torch operations, a user's f and its derivatives by autodiff
among them. Each operation is one line of `OPERATIONS`; the printed lines become a `triton.jit` function that
`triton_rows` calls on every tile. Every constant carries its dtype, so that float64 stays float64 inside a float32
kernel and the other way round.
"""

from __future__ import annotations

import hashlib
import linecache
import math
from typing import TYPE_CHECKING, Any, cast

import torch
import triton
import triton.language as tl
from torch.fx import GraphModule, Node

from kullback.divergence import kernels, triton_math

if TYPE_CHECKING:
    from kullback.divergence.curves import FDivergence

ARGUMENTS = ("target", "model", "z_target", "z_model")
DTYPES = {torch.float32: "tl.float32", torch.float64: "tl.float64", torch.bool: "tl.int1"}


class Unprintable(ValueError):
    """The divergence uses an operation that has no line in `OPERATIONS`."""


# One template per operation of ATen; the operands stand for {0}, {1}, ... and have the dtype of the result, or for a
# comparison the dtype of its tensors.
_ARITHMETIC = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "exp": "tl.exp({0})",
    "expm1": "expm1({0})",
    "log": "tl.log({0})",
    "log1p": "log1p({0})",
    "tanh": "tanh({0})",
    "sigmoid": "tl.sigmoid({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "1.0 / tl.sqrt({0})",
    "reciprocal": "1.0 / {0}",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "sign": "sign({0})",
    "relu": "tl.maximum({0}, 0.0, propagate_nan=tl.PropagateNan.ALL)",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
}
COMPARISONS = {
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "isinf": "tl.abs({0}) == float('inf')",
    "isnan": "{0} != {0}",
    "logical_not": "{0} == 0",
    "bitwise_not": "{0} == 0",
}
_AND, _OR = "{0} & {1}", "{0} | {1}"
LOGIC = {"mul": _AND, "logical_and": _AND, "bitwise_and": _AND, "logical_or": _OR, "bitwise_or": _OR}
OPERATIONS = _ARITHMETIC | COMPARISONS
SAME = ("alias", "detach", "clone", "lift_fresh_copy", "expand", "view", "_to_copy", "convert_element_type")
FILLED = {"zeros_like": 0.0, "ones_like": 1.0, "_efficientzerotensor": 0.0, "zeros": 0.0, "ones": 1.0}


def source(divergence: FDivergence, dtype: torch.dtype) -> str:
    """The text of `pointwise`: (target logits, model logits, their normalisers) -> (log model, m f, m g), in `dtype`.

    Raises:
        Unprintable: the divergence uses an operation that is not in the tables above.
    """
    return print_graph(trace(divergence, dtype), str(divergence))


def jitted(text: str) -> Any:
    """The function that a text of `source` defines."""
    name = "pointwise_" + hashlib.sha256(text.encode()).hexdigest()[:16]  # Triton tells functions apart by name
    text, file = text.replace("def pointwise(", f"def {name}("), f"<kullback {name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # where Triton reads it
    helpers = {f.__name__: f for f in (triton_math.expm1, triton_math.log1p, triton_math.tanh, triton_math.sign)}
    scope = {"__name__": __name__, "triton": triton, "tl": tl, **helpers}
    exec(compile(text, file, "exec"), scope)
    return scope[name]


def trace(divergence: FDivergence, dtype: torch.dtype) -> GraphModule:
    """`kernels.weighted` as a graph of core ATen operations."""
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    def run(*x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return kernels.weighted(divergence, *x)

    example = (torch.zeros(3, dtype=dtype) for _ in ARGUMENTS)
    with torch.no_grad():
        graph: GraphModule = make_fx(run, decomposition_table=dict(core_aten_decompositions().items()))(*example)
    return graph


def print_graph(graph: GraphModule, title: str) -> str:
    """The graph as a Triton function named `pointwise`: equal expressions once, unused ones never."""
    nodes = list(graph.graph.nodes)
    printer = _Printer(graph)
    live = set(nodes[-1].all_input_nodes)
    for node in reversed(nodes):
        if node in live and not _constant(node):
            live.update(node.all_input_nodes)
    arguments = (node for node in nodes if node.op == "placeholder")
    printer.known.update(zip(arguments, ARGUMENTS, strict=True))
    for node in nodes:
        if node in live and node.op != "placeholder":
            printer.known[node] = printer.expression(node)
    results = ", ".join(printer.operand(node, node.meta["val"].dtype) for node in nodes[-1].args[0])
    body = "".join(f"    {line}\n" for line in (*printer.lines, f"return {results}"))
    return f"# {title!r}\n@triton.jit\ndef pointwise({', '.join(ARGUMENTS)}):\n{body}"


def _name(node: Node) -> str:
    return str(node.target).split(".")[1] if node.op == "call_function" else node.op


def _constant(node: Node) -> bool:
    return _name(node) in ("full_like", "full", "scalar_tensor", "get_attr", *FILLED)


class _Printer:
    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.lines: list[str] = []
        self.variables: dict[str, str] = {}  # expression -> the variable that holds it
        self.known: dict[Node, str | float] = {}  # the variable of a node, or the number it is filled with

    def expression(self, node: Node) -> str | float:
        name, dtype = _name(node), node.meta["val"].dtype if "val" in node.meta else None
        if _constant(node):
            return self.number(node, name)
        if dtype not in DTYPES:
            raise Unprintable(f"{node.target} of {dtype}")
        if name in SAME:
            return self.operand(node.args[0], dtype)
        if name == "where":
            condition, *branches = node.args
            yes, no = (self.operand(x, dtype) for x in branches)
            return self.assign(f"tl.where({self.operand(condition, torch.bool)}, {yes}, {no})")
        if name == "clamp" and not node.kwargs:
            return self.clamp(node, dtype)
        if name == "pow" and isinstance(node.args[1], (int, float)):
            return self.assign(_power(self.operand(node.args[0], dtype), float(node.args[1])))
        table = LOGIC if dtype == torch.bool and name in LOGIC else OPERATIONS
        if name not in table or len(node.kwargs) > 0:
            raise Unprintable(f"{node.target}({', '.join(map(str, node.args))}, {dict(node.kwargs)})")
        if name in COMPARISONS:  # their operands meet in a dtype of their own
            dtypes = [x.meta["val"].dtype for x in node.all_input_nodes if x.meta["val"].dim()] or [torch.float64]
            dtype = max(dtypes, key=lambda d: d.itemsize)
        return self.assign(table[name].format(*(self.operand(x, dtype) for x in node.args)))

    def number(self, node: Node, name: str) -> float:
        if name == "get_attr":
            held = getattr(self.graph, str(node.target))
            if held.numel() != 1:
                raise Unprintable(f"a tensor of shape {tuple(held.shape)}: only numbers can stand inside a divergence")
            return float(held)
        return FILLED[name] if name in FILLED else float(cast(float, node.args[0 if name == "scalar_tensor" else 1]))

    def clamp(self, node: Node, dtype: torch.dtype) -> str:
        x = self.operand(node.args[0], dtype)
        low, high = (*node.args[1:], None, None)[:2]
        for bound, side in ((low, "maximum"), (high, "minimum")):
            if bound is not None:
                x = self.assign(OPERATIONS[side].format(x, self.operand(bound, dtype)))
        return x

    def operand(self, x: Any, dtype: torch.dtype) -> str:
        """The text of an argument, cast to `dtype`."""
        held = self.known[x] if isinstance(x, Node) else float(x)
        if isinstance(held, float):
            number = repr(held) if math.isfinite(held) else f'float("{held}")'
            number = str(int(held)) if dtype == torch.bool else number
            return self.assign(f"tl.full((), {number}, {DTYPES[dtype]})")
        return held if x.meta["val"].dtype == dtype else self.assign(f"{held}.to({DTYPES[dtype]})")

    def assign(self, expression: str) -> str:
        if expression not in self.variables:
            self.variables[expression] = f"x{len(self.variables)}"
            self.lines.append(f"{self.variables[expression]} = {expression}")
        return self.variables[expression]


def _power(x: str, exponent: float) -> str:
    size = abs(exponent)
    if size == int(size) and size <= 4:
        out = " * ".join([x] * int(size)) or "1.0"
    elif size == 0.5:
        out = f"tl.sqrt({x})"
    else:
        return f"tl.exp({exponent!r} * tl.log({x}))"
    return out if exponent > 0 else f"1.0 / ({out})"
