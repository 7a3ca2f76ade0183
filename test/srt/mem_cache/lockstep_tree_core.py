"""A tree core that runs the Rust and the Python core side by side, and compares them.

`tree_core_backend="lockstep"` gives the cache the Rust core. Each operation on it is done
on the Python core, too: both must return the same lengths, slots and actions. Node ids
and lock ids are each core's own, so they are compared by a one-to-one map.
"""

import copy
import inspect
from typing import Any, Dict

import torch

from sglang.srt.mem_cache.base_prefix_cache import DecLockRefParams
from sglang.srt.mem_cache.rust_tree_core.adapter import RustUnifiedTreeCore
from sglang.srt.mem_cache.unified_cache.tree_core_registry import (
    register_tree_core_backend,
)
from sglang.srt.mem_cache.unified_cache.unified_tree_core import UnifiedTreeCore
from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import (
    BaseEvictionResult,
    RadixCacheWalkResult,
    UnifiedTreeCoreInterface,
)

OPERATIONS = {
    name: list(inspect.signature(function).parameters)[1:]
    for name, function in inspect.getmembers(
        UnifiedTreeCoreInterface, inspect.isfunction
    )
    if not name.startswith("_") and name not in ("node_by_id", "pretty_print")
}
OWN = ("rust", "python", "node_ids", "lock_ids", "busy")


class LockstepTreeCore:
    def __init__(self, params, components):
        object.__setattr__(self, "rust", RustUnifiedTreeCore(params))
        object.__setattr__(self, "python", UnifiedTreeCore(params, components))
        object.__setattr__(self, "node_ids", {})  # the Rust core's -> the Python core's
        object.__setattr__(self, "lock_ids", {})
        object.__setattr__(self, "busy", False)
        self.root_node_handle()

    def __getattr__(self, name):
        """The Python core's, as its components reach into it, but for operations."""
        if name in OPERATIONS and not self.busy:
            return lambda *args, **kwargs: self.run(name, args, kwargs)
        return getattr(self.python, name)

    def __setattr__(self, name, value):
        if name == "busy":
            object.__setattr__(self, name, value)
            return
        assert name not in OWN
        setattr(self.rust, name, value)
        setattr(self.python, name, value)

    @property
    def empty_match_result(self):
        if self.busy:
            return self.python.empty_match_result
        ours, theirs = self.rust.empty_match_result, self.python.empty_match_result
        self.compare(ours, theirs, "empty_match_result")
        return ours

    def run(self, name: str, args: tuple, kwargs: dict):
        kwargs = {**dict(zip(OPERATIONS[name], args)), **kwargs}
        theirs = {key: self.translate(key, value) for key, value in kwargs.items()}
        ours = getattr(self.rust, name)(**kwargs)
        self.busy = True
        try:
            theirs = getattr(self.python, name)(**theirs)
        finally:
            self.busy = False
        if name == "reset":
            self.node_ids.clear()
            self.lock_ids.clear()
        if isinstance(ours, RadixCacheWalkResult):
            # The order of a node's children is each core's own.
            assert _sorted_rows(ours) == _sorted_rows(theirs), name
        else:
            self.compare(ours, theirs, name)
        if isinstance(theirs, BaseEvictionResult):
            # The slots are freed once, as the Rust core says.
            for freed in (theirs.device_frees, theirs.host_frees, theirs.cache_actions):
                freed.clear()
        return ours

    def translate(self, name: str, value: Any) -> Any:
        """An argument as the Python core knows it."""
        if name.endswith("node_id") and value is not None:
            return self.node_ids[value]
        if name.endswith("node_ids"):
            return [self.node_ids[node_id] for node_id in value]
        if isinstance(value, DecLockRefParams):
            value = copy.copy(value)
            value.node_id = self.node_ids[value.node_id]
            value.component_lock_uuids = {
                component: self.lock_ids.get(uuid)
                for component, uuid in value.component_lock_uuids.items()
            }
            return value
        return copy.copy(value) if isinstance(value, dict) else value

    def compare(self, ours: Any, theirs: Any, where: str):
        """Equal, with the cores' own ids mapped one to one; learns new ids."""
        name = where.rsplit(".", 1)[-1]
        if name.endswith(("lock_uuids[1]", "lock_uuids[SWA]")):
            self.compare_ids(self.lock_ids, ours, theirs, where)
        elif isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs), f"{where}: {ours} != {theirs}"
        elif isinstance(ours, dict):
            assert {k for k, v in ours.items() if _some(v)} == {
                k for k, v in theirs.items() if _some(v)
            }, f"{where}: {ours} != {theirs}"
            for key in ours:
                if key in theirs:
                    self.compare(ours[key], theirs[key], f"{where}[{_name(key)}]")
        elif isinstance(ours, (list, tuple)) and not hasattr(ours, "_fields"):
            assert len(ours) == len(theirs), f"{where}: {ours} != {theirs}"
            for i, pair in enumerate(zip(ours, theirs)):
                self.compare(*pair, f"{where}[{i}]")
        elif (fields := _fields(ours)) is not None:
            assert type(ours) is type(theirs), f"{where}: {ours} != {theirs}"
            for field in fields:
                pair = getattr(ours, field), getattr(theirs, field)
                self.compare(*pair, f"{where}.{field}")
        elif "node" in name or name == "parent_id":
            self.compare_ids(self.node_ids, ours, theirs, where)
        else:
            assert ours == theirs, f"{where}: {ours} != {theirs}"

    @staticmethod
    def compare_ids(known: Dict[int, int], ours, theirs, where: str):
        if ours is None or theirs is None:
            assert ours is theirs, f"{where}: {ours} != {theirs}"
        else:
            assert known.setdefault(ours, theirs) == theirs, f"{where}: another node"


def _some(value) -> bool:
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)


def _name(key) -> str:
    return getattr(key, "name", str(key))


def _sorted_rows(walk: RadixCacheWalkResult) -> list:
    columns = walk.slot_indices, walk.positions, walk.prev_slot_indices
    return sorted(zip(*(torch.as_tensor(column).tolist() for column in columns)))


def _fields(value):
    """The names of a struct's, data class's or named tuple's fields, or None."""
    for attribute in ("__struct_fields__", "_fields", "__dataclass_fields__"):
        if hasattr(value, attribute):
            return list(getattr(value, attribute))
    return None


register_tree_core_backend("lockstep", LockstepTreeCore)
