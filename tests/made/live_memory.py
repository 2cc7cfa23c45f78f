"""Measures memory for tests: bytes kept for the backward pass, and bytes of the tensors alive at any time."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def kept_bytes(forward: Callable[[], Tensor], modules: dict[str, nn.Module]) -> tuple[Tensor, dict[str, int]]:
    """Runs a forward pass. Returns its output and the bytes of the storages that it keeps for the backward pass, by the
    name of the module that ran when a storage was first kept ("" outside all modules).

    Parameters are not counted, and each storage is counted once.
    """
    running = [""]
    bytes_by_module: dict[str, int] = defaultdict(int)
    kept: dict[int, Tensor] = {}  # keeps tensors alive, so that no address is used twice
    handles = []
    for name, module in modules.items():

        def enter(_module: nn.Module, _args: Any, name: str = name) -> None:
            running.append(name)

        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            running.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    weights = {p.untyped_storage().data_ptr() for module in modules.values() for p in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = tensor
            bytes_by_module[running[-1]] += storage.nbytes()
        return tensor

    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            out = forward()
    finally:
        for handle in handles:
            handle.remove()
    return out, dict(bytes_by_module)


class Live(TorchDispatchMode):
    """Counts bytes of storages that were made inside the mode and are alive: `now`, and the highest so far, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        input_storages = {
            id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in input_storages and storage not in self._sizes:
                    self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        size = storage.nbytes()
        self._sizes[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
