"""A network compiled for the kernels: its operations are traced, and those that follow each other become layers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn

from kitseg.native.arena import Arena
from kitseg.native.layers import (
    ACTIVATIONS,
    CONVOLUTIONS,
    INSTANCE_NORMS,
    Halve,
    Layer,
    halves,
    has_kernel,
    is_norm,
)
from kitseg.native.network import CompiledNetwork

ADD = (operator.add, torch.add)
Modules = Mapping[fx.Node, nn.Module]
IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d)  # in inference


def _change(how: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda one, other: one.tracer.create_proxy("call_function", how, (one, other), {})


class _Proxy(fx.Proxy):
    """Records ``x += y`` and the like as changes in place; fx records sums, products and so on."""

    __iadd__, __isub__, __imul__, __itruediv__ = map(_change, IN_PLACE)


class _Tracer(fx.Tracer):
    """Traces a method; a module of a subclass of PyTorch's own is one operation, too, if it computes the same."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.traced_func_name = method

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _computes_as_pytorch(m) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def compile_network(model: nn.Module, method: str, output: int, keep: bool = True) -> CompiledNetwork:
    """One of the tensors that a method returns for a tensor, valid until the next call; holds its weights itself.

    keep: see ``Layer``.

    Raises:
        Exception: of any kind, where the method can't be traced, or a module has hooks, which would not run.
    """
    if hooked := [name for name, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks]:
        raise ValueError(f"{hooked[0]} has hooks")
    graph = _Tracer(method).trace(model)
    end: Any = next(node for node in graph.nodes if node.op == "output")
    end.args = (end.args[0][output],)
    modules = {node: model.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _changes(node, modules))
    modules = {node: module for node, module in modules.items() if node in graph.nodes}
    for node, module in modules.items():
        if isinstance(module, NOTHING):
            before: Any = node.args[0]
            node.replace_all_uses_with(before)
            graph.erase_node(node)
    _replace_changes(graph, modules)
    root, arena, done = nn.Module(), Arena(), set[fx.Node]()
    for number, node in enumerate([*graph.nodes]):
        name = f"part_{number}"
        if node.op == "get_attr":
            root.register_buffer(name, _attribute(model, str(node.target)).detach().clone())
            node.target = name
        elif node.op == "call_module" and node not in done:
            chain = _Chain(node, modules)
            if chain.is_layer and (node.kwargs or len(node.args) != 1):
                raise ValueError(f"{node.target} is called with more than its input")
            root.add_module(name, chain.layer(arena, keep) if chain.is_layer else _copy(modules[node]))
            chain.replace_by(name)
            done.update(chain.nodes)
    _keep_parts(graph, root, modules)
    _repeat_in_layers(graph, root, modules)
    _add_in_place(graph, root)
    graph.lint()
    return CompiledNetwork(root, graph, arena)


def _computes_as_pytorch(module: nn.Module) -> bool:
    """Whether it is a convolution or a norm of PyTorch's, or of a subclass that computes the same."""
    kind: Any = next((kind for kind in (*CONVOLUTIONS, *INSTANCE_NORMS) if isinstance(module, kind)), None)
    ways = ("forward", "_conv_forward")
    same = kind and all(getattr(type(module), way, None) is getattr(kind, way, None) for way in ways)
    return bool(same or getattr(module, "computes_as_pytorch", False))


def _replace_changes(graph: fx.Graph, modules: Modules) -> None:
    """Make ``y += x`` a sum where nothing else uses ``y``, a module's own result: sums become part of layers."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in IN_PLACE:
            changed: Any = node.args[0]
            own = isinstance(changed, fx.Node) and changed.op == "call_module" and not _changes(changed, modules)
            if own and len(changed.users) == 1:
                node.target = IN_PLACE[node.target]


def _keep_parts(graph: fx.Graph, root: nn.Module, modules: Modules) -> None:
    """Give layers the two parts of a concatenation of channels instead of a copy, where only layers use it.

    Not where an operation changes a part in place, which the copy would not have seen.
    """
    for node in [*graph.nodes]:
        if node.op != "call_function" or node.target is not torch.cat or not node.args:
            continue
        parts: Any = node.args[0]
        channels = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0) == 1
        usable = channels and isinstance(parts, list | tuple) and len(parts) == 2
        if (
            usable
            and not any(_is_changed(part, modules) for part in parts)
            and all(_takes_parts(user, node, root) for user in node.users)
        ):
            for user in [*node.users]:
                user.args = tuple(tuple(parts) if arg is node else arg for arg in user.args)
            graph.erase_node(node)


def _repeat_in_layers(graph: fx.Graph, root: nn.Module, modules: Modules) -> None:
    """Give layers that add ``x.repeat(1, n, 1, ...)`` the tensor itself: they add its channels n times."""
    for node in [*graph.nodes]:
        if node.op != "call_method" or node.target != "repeat" or node.kwargs:
            continue
        source, *counts = node.args
        times = len(counts) > 1 and isinstance(counts[1], int) and {*counts[:1], *counts[2:]} == {1}
        added = all(_adds(user, node, root) and user.args[1:] == (node,) for user in node.users)
        if times and added and not _is_changed(source, modules):
            for user in [*node.users]:
                layer: Any = root.get_submodule(str(user.target))
                user.args, layer.repeats = (user.args[0], source), tuple(counts)
            graph.erase_node(node)


def _add_in_place(graph: fx.Graph, root: nn.Module) -> None:
    """Put a sum where one of its summands is, if that is a layer's result which nothing else uses."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target in ADD and len(node.args) == 2 and not node.kwargs:
            for one, other in (node.args, node.args[::-1]):
                alone = isinstance(one, fx.Node) and one.op == "call_module" and len(one.users) == 1
                if alone and isinstance(other, fx.Node) and isinstance(root.get_submodule(str(one.target)), Layer):
                    node.target, node.args = _add, (one, other)
                    break


def _add(one: Tensor, other: Tensor) -> Tensor:
    if one.shape != other.shape:
        return one + other
    return one if one.is_meta else one.add_(other)


def _adds(user: fx.Node, residual: fx.Node, root: nn.Module) -> bool:
    """Whether it is a layer that only adds a tensor."""
    layer = root.get_submodule(str(user.target)) if user.op == "call_module" else None
    return isinstance(layer, Layer) and user.args[0] is not residual


def _takes_parts(user: fx.Node, joined: fx.Node, root: nn.Module) -> bool:
    """Whether it is a layer that reads a concatenation by a kernel: as its input, or as what it adds."""
    layer = root.get_submodule(str(user.target)) if user.op == "call_module" else None
    takes = isinstance(layer, Layer) and layer.native is not None and layer.native.takes_parts
    return takes or _adds(user, joined, root)


class _Chain:
    """The operations after a node, each the only one that uses what comes before it, that a layer does at once."""

    def __init__(self, node: fx.Node, modules: Modules) -> None:
        self.modules, self.nodes = modules, [node]
        self.residual: fx.Node | None = None
        module = modules[node]
        self.convolution = module if isinstance(module, CONVOLUTIONS) else None
        self.norm = module if is_norm(module) else None
        if self.convolution is not None:
            self.norm = self._next(is_norm)
        self.first, self.second = None, None
        if self.convolution is not None or self.norm is not None:
            self.first = self._next(_is_activation)
            self._add()
            self.second = self._next(_is_activation) if self.residual else None

    @property
    def is_layer(self) -> bool:
        """Whether a layer does more than PyTorch."""
        return has_kernel(self.convolution) or len(self.nodes) > 1 or self.norm is not None

    def layer(self, arena: Arena, keep: bool) -> Layer:
        """The layer that does it all."""
        return Layer(self.convolution, self.norm, self.first, self.second, arena, keep)

    def replace_by(self, name: str) -> None:
        """Put a module where the last operation is, and remove the operations."""
        start, end = self.nodes[0], self.nodes[-1]
        inputs = (*start.args[:1], *([self.residual] if self.residual else []))
        if len(self.nodes) == 1:
            start.target = name
            return
        with end.graph.inserting_before(end):
            new = end.graph.call_module(name, inputs)
        end.replace_all_uses_with(new)
        for node in reversed(self.nodes):
            node.graph.erase_node(node)

    def _next(self, wanted: Callable[[nn.Module], bool]) -> nn.Module | None:
        """Add the only user of the last operation to the chain, if it is a module of a kind."""
        user = self._user()
        if user is None or user not in self.modules or not wanted(self.modules[user]):
            return None
        sources = (*self.nodes[0].args, self.residual)
        if any(_is_changed(source, self.modules) for source in sources):  # before the layer would read it
            return None
        self.nodes.append(user)
        return self.modules[user]

    def _add(self) -> None:
        """Add a sum with another tensor, unless something changes the chain's input in place before that."""
        user, last = self._user(), self.nodes[-1]
        if user is None or user.op != "call_function" or user.target not in ADD or user.kwargs or len(user.args) != 2:
            return
        (other,) = [arg for arg in user.args if arg is not last] or [None]
        source: Any = self.nodes[0].args[0]
        if isinstance(other, fx.Node) and not any(_changes(node, self.modules) for node in source.users):
            self.residual = other
            self.nodes.append(user)

    def _user(self) -> fx.Node | None:
        users = [*self.nodes[-1].users]
        return users[0] if len(users) == 1 else None


def _changes(node: fx.Node, modules: Modules) -> bool:
    """Whether an operation may change its input in place."""
    if node.op == "call_module":
        return bool(getattr(modules.get(node), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or bool(node.kwargs.get("inplace")) or node.target in IN_PLACE


def _is_changed(value: Any, modules: Modules) -> bool:
    """Whether an operation may change a value in place."""
    users = value.users if isinstance(value, fx.Node) else ()
    return any(_changes(user, modules) and value in user.args[:1] for user in users)


def _copy(module: nn.Module) -> nn.Module:
    copy: Any = deepcopy(module)
    return Halve(copy) if halves(copy) else copy


def _attribute(model: nn.Module, name: str) -> Tensor:
    owner, _, last = name.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), last)
    return found


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, ACTIVATIONS)
