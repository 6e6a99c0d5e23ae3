"""What the layers of a model do in a forward in eager mode, written down so that layers can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from ia3_export.libraries import private


def recorded(
    model: Any, layers: Sequence[tuple[str, Any]], forward: Callable[[], Any]
) -> dict[str, list[Call]]:
    """Run `forward` and return what each of `layers` of `model` (module path, module) did, call by call."""
    times = Counter(id(tensor) for _, tensor in named_tensors(model))
    tied = {key for key, count in times.items() if count > 1}
    mode = private("torch.utils._python_dispatch:TorchDispatchMode")
    calls: dict[str, list[Call]] = {path: [] for path, _ in layers}
    running: list[Call] = []

    class Recorder(mode):  # type: ignore[misc, valid-type]
        def __torch_dispatch__(
            self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            out = op(*args, **(kwargs or {}))
            for call in running:
                call.note(op, args, kwargs or {}, out)
            return out

    def noted(path: str, layer: Any) -> Callable[..., Any]:
        original = layer.forward

        @wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            call = Call(layer, (args, kwargs), tied)
            calls[path].append(call)
            running.append(call)
            out = original(*args, **kwargs)
            running.pop()
            call.end(out)
            return out

        return run

    with ExitStack() as stack:
        for path, layer in layers:
            stack.enter_context(forward_replaced(layer, noted(path, layer)))
        stack.enter_context(Recorder())
        forward()
    return calls


class Call:
    """One call of a layer.

    Attributes:
        steps: hashable: the arguments, every operator with its inputs, what was returned. Tensors are named
            by where they come from: a parameter, an argument, the cache, an earlier step; one from elsewhere
            and a tied parameter are named by their identity.
        slot: the index of the cache's entry that was replaced, None where none was.
        writes: whether it changed something in a way that a graph's inputs and outputs do not show.
    """

    def __init__(self, layer: Any, arguments: Any, tied: Set[int]) -> None:
        self.steps: list[Any] = []
        self.slot: int | None = None
        self.writes = False
        self._names: dict[int, Any] = {}
        self._alive: list[Any] = []  # an id tells a tensor from others while all live
        self._outside: list[Any] = []  # as long as calls are compared
        self._made: set[int] = set()
        for name, tensor in named_tensors(layer):
            if id(tensor) not in tied:
                self._name(tensor, ("parameter", name))
        self._arguments, _ = leaves_of(arguments)
        for i, leaf in enumerate(self._arguments):
            self._name(leaf, ("argument", i))
        self._entries = _cache_entries(self._arguments)
        for i, entry in enumerate(self._entries):
            for part, tensor in enumerate(entry):
                self._name(tensor, ("entry", i, part))
        self._note("call", arguments)

    def note(self, op: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        """Add the operator `op`, its arguments and its result."""
        if op.__name__.startswith("lift_fresh"):  # a constant that was written in Python
            self._name(args[0], ("constant", str(args[0].tolist())))
        given = {a.name: v for a, v in zip(op._schema.arguments, args, strict=False)} | dict(kwargs)
        for argument in op._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                written, _ = leaves_of(given.get(argument.name))
                self.writes |= any(_storage(t) not in self._made for t in written if t is not None)
        # a view is of what it is a view of
        aliases = any(r.alias_info is not None for r in op._schema.returns)
        for i, tensor in enumerate(leaves_of(out)[0]):
            self._name(tensor, ("step", len(self.steps), i))
            if not aliases and (storage := _storage(tensor)) is not None:
                self._made.add(storage)
        self._note(str(op), (args, kwargs, out))

    def end(self, returned: Any) -> None:
        """Add what was `returned` and what has become of the cache."""
        now = _cache_entries(self._arguments)
        before = [[id(t) for t in entry] for entry in self._entries]
        changed = [i for i, e in enumerate(now) if i >= len(before) or [id(t) for t in e] != before[i]]
        after = []
        if changed:
            self.slot = changed[0]
            after = now[changed[0]]
            # an entry that is only begun here holds no tensors that an operator could take
            began = changed[0] >= len(before) or len(before[changed[0]]) != len(after)
            self.writes |= len(changed) > 1 or began
        self._note("return", (returned, after))
        own = ("entry", self.slot)
        self.steps = _with_own(tuple(self.steps), own)
        self._names, self._alive, self._entries, self._arguments = {}, [], [], []

    def _name(self, tensor: Any, name: Any) -> None:
        import torch

        if isinstance(tensor, torch.Tensor):
            self._names[id(tensor)] = name
            self._alive.append(tensor)

    def _note(self, what: str, values: Any) -> None:
        leaves, spec = leaves_of(values)
        self.steps.append((what, str(spec), tuple(self._described(leaf) for leaf in leaves)))

    def _described(self, leaf: Any) -> Any:
        import torch

        if isinstance(leaf, torch.Tensor):
            if id(leaf) not in self._names:
                self._names[id(leaf)] = ("outside", id(leaf))
                self._outside.append(leaf)
            return self._names[id(leaf)], tuple(leaf.shape), str(leaf.dtype)
        plain = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout)
        if isinstance(leaf, plain):
            return repr(leaf)
        self._outside.append(leaf)
        return "object", id(leaf)


def _with_own(value: Any, own: tuple[str, int | None]) -> Any:
    """`value` with a layer's own entry of the cache named so, without its index."""
    if isinstance(value, tuple):
        if value[:2] == own:
            return ("own entry", *value[2:])
        return tuple(_with_own(v, own) for v in value)
    return value


def named_tensors(module: Any) -> list[tuple[str, Any]]:
    """Parameters and buffers with their paths in `module`; tied ones have several."""
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _storage(tensor: Any) -> int | None:
    import torch

    return tensor.untyped_storage()._cdata if isinstance(tensor, torch.Tensor) else None


def leaves_of(values: Any) -> tuple[list[Any], Any]:
    """The leaves of nested `values` and their structure, for `put_together`.

    A cache of keys and values is one leaf.
    """
    from transformers import Cache

    tree_flatten = private("torch.utils._pytree:tree_flatten")
    leaves, structure = tree_flatten(values, is_leaf=lambda x: isinstance(x, Cache))
    return leaves, structure


def put_together(leaves: Sequence[Any], structure: Any) -> Any:
    """The nested values of `leaves_of`."""
    return private("torch.utils._pytree:tree_unflatten")(leaves, structure)


def _caches(leaves: Sequence[Any]) -> list[Any]:
    """The caches of one kind of attention each among `leaves`."""
    from transformers import Cache, EncoderDecoderCache

    found = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Cache)}.values()
    return [
        part
        for cache in found
        for part in (
            (cache.self_attention_cache, cache.cross_attention_cache)
            if isinstance(cache, EncoderDecoderCache)
            else (cache,)
        )
    ]


def _cache_entries(leaves: Sequence[Any]) -> list[list[Any]]:
    """The tensors of each entry of the caches among `leaves`."""
    length = max((len(cache.layers) for cache in _caches(leaves)), default=0)
    return [[getattr(entry, name) for entry, name in cache_slots(leaves, i)] for i in range(length)]


def cache_slots(leaves: Sequence[Any], index: int | None) -> list[tuple[Any, str]]:
    """Where the tensors of the `index`-th entry stand in the caches among `leaves`: object and attribute."""
    import torch

    if index is None:
        return []
    entries = [cache.layers[index] for cache in _caches(leaves) if index < len(cache.layers)]
    return [
        (entry, name)
        for entry in entries
        for name in ("keys", "values")
        if isinstance(getattr(entry, name, None), torch.Tensor)
    ]


@contextmanager
def forward_replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` with another ``forward`` while this is entered."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
