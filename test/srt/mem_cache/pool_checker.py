"""What holds of the KV pools under the scheduler's code (cache_scheduler.py)."""

from typing import Set

import torch
from cache_scheduler import MAX_REQS, CacheScheduler

from sglang.srt.mem_cache.unified_cache.component_type import ComponentType


class PoolChecker:
    """What holds between two turns of the scheduler, whatever happened before."""

    def __init__(self, scheduler: CacheScheduler):
        self.scheduler = scheduler
        self.allocator = scheduler.token_to_kv_pool_allocator
        self.tree = scheduler.tree_cache

    def tree_slots(self, unlocked: bool = False, swa: bool = False) -> Set[int]:
        """Full slots of the tree's nodes: of all, or of those that no request locks; with
        swa of those whose SWA slots are there, or there and not locked."""
        walk = self.tree.tree_core.walk_for_kv_canary(unlocked, swa)
        return set(walk.slot_indices.tolist())

    @torch.inference_mode()
    def check(self):
        live = self.scheduler.live_requests()
        tree_full, tree_swa = self.tree_slots(), self.tree_slots(swa=True)
        mapping = self.allocator.full_to_swa_index_mapping.tolist()
        self.check_owners(live, tree_full, tree_swa, mapping)
        self.check_requests(live, tree_full, mapping)
        self.check_locks(live, tree_full, tree_swa)
        self.tree.sanity_check()
        if self.scheduler.last_batch is not None:
            self.scheduler.invariant_checker.self_check_during_busy()

    def check_owners(self, live, tree_full, tree_swa, mapping):
        """Every slot is free or has one owner, in both pools."""
        allocator, tree, page = self.allocator, self.tree, self.scheduler.page_size
        assert allocator.free_group is None
        assert not any(
            mapping[slot] for slot in tree_full - tree_swa
        ), "a tombstone holds SWA slots"

        full_owners, swa_owners = [tree_full], [[mapping[slot] for slot in tree_swa]]
        for req in live:
            start = req.kv.cache_protected_len
            row = self.scheduler.row(req, req.kv.kv_allocated_len)
            full_owners.append(row[start:])
            start = max(start, req.kv.get_evicted_seqlen(ComponentType.SWA))
            swa_owners.append([mapping[slot] for slot in row[start:]])

        for name, owners, sub, size in (
            ("full", full_owners, allocator.full_attn_allocator, allocator.size_full),
            ("swa", swa_owners, allocator.swa_attn_allocator, allocator.size_swa),
        ):
            pages = [{slot // page for slot in slots} for slots in owners]
            assert not any(0 in p for p in pages), f"{name}: slot 0 is held"
            everything = sub.get_all_free_pages().tolist()
            for p in pages:
                everything += p
            assert len(set(everything)) == len(
                everything
            ), f"{name}: a slot has two owners, or is free and held"
            assert len(everything) == size // page, f"{name}: a slot was lost"

        for counted, slots in (
            (tree.full_evictable_size() + tree.full_protected_size(), tree_full),
            (tree.swa_evictable_size() + tree.swa_protected_size(), tree_swa),
        ):
            assert counted == len(slots), "the tree counts its slots wrongly"
        # A page's slots that were allocated ahead keep their entry when it is freed.
        mapped = mapping[:-1]
        if page > 1:
            mapped = [mapping[slot] for slots in full_owners for slot in slots]
        mapped = [slot for slot in mapped if slot > 0]
        assert len(set(mapped)) == len(mapped), "two slots share a SWA slot"

    def check_requests(self, live, tree_full, mapping):
        """A running request still holds its whole prompt and its whole window."""
        page, window = self.scheduler.page_size, self.scheduler.window
        free = set(self.allocator.full_attn_allocator.get_all_free_pages().tolist())
        for req in live:
            kv, rid = req.kv, req.rid
            assert kv.cache_protected_len <= kv.kv_committed_len <= kv.kv_allocated_len
            row = self.scheduler.row(req, kv.kv_committed_len)
            assert free.isdisjoint(
                slot // page for slot in row
            ), f"{rid}: a slot is free"
            assert tree_full.issuperset(
                row[: kv.cache_protected_len]
            ), f"{rid}: its prefix is not the tree's"
            assert all(
                mapping[slot] > 0 for slot in row[max(0, len(row) - window) :]
            ), f"{rid}: its window is not held"

    def check_locks(self, live, tree_full, tree_swa):
        """The paths of the running requests are locked, and nothing else is."""
        core = self.tree.tree_core
        root = core.root_node_handle()
        paths, swa_paths, windows = set(), set(), set()
        for req in live:
            if req.lock is None:
                continue
            path = core.collect_full_device_indices(req.lock.node, root).tolist()
            paths.update(path)
            if not req.lock.swa_released:
                swa_paths.update(path)
                windows.update(path[max(0, len(path) - self.scheduler.window) :])
        locked = tree_full - self.tree_slots(unlocked=True)
        assert self.tree.full_protected_size() == len(locked)
        assert locked == paths, "a full lock was dropped, or is left"

        locked = tree_swa - self.tree_slots(unlocked=True, swa=True)
        assert self.tree.swa_protected_size() == len(locked)
        assert windows <= locked, "a SWA lock was dropped"
        # A lock begins at a node's start, up to a node before its window.
        assert locked <= swa_paths, "a SWA lock is left"

    @torch.inference_mode()
    def check_idle(self):
        """Nothing is held but by the tree, and without the tree all slots are free."""
        scheduler, tree, allocator = self.scheduler, self.tree, self.allocator
        assert not scheduler.has_work(), "a request never finished"
        assert scheduler.req_to_token_pool.available_size() == MAX_REQS
        self.check()
        assert tree.full_protected_size() == tree.swa_protected_size() == 0
        full_size, swa_size = allocator.size_full, allocator.size_swa
        assert allocator.full_available_size() + tree.full_evictable_size() == full_size
        assert allocator.swa_available_size() + tree.swa_evictable_size() == swa_size
        scheduler.evict(full_size, swa_size)
        assert not self.tree_slots()
        assert allocator.full_available_size() == full_size
        assert allocator.swa_available_size() == swa_size
