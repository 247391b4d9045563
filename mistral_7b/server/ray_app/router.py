"""Routing by exact prefix: a request goes to the replica that holds the longest chain of its pages.

    prompt     p0 p1 p2 p3                a page's key is a hash of all tokens up to its end, of adapter and salt
    replica A  p0 p1 p2       load 3      <- 3 pages need not be computed
    replica B  p0             load 1

The keys are those of engine/pages.py, and what is usable of a chain is decided as in the engine, window included:
what counts as held is found there. Replicas tell their keys once a second; what was routed since counts as held
for a while. A conversation thus stays where it is, without an id of the session.

A replica with IMBALANCE requests more than the least loaded one comes after all others. Among equals, the least
loaded comes first.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ...engine.window import usable_prefix
from . import wire
from .wire import NAME, Route

IMBALANCE = 8  # requests
FRESH = 3.0  # seconds for which the pages of a routed request count as held: until the replica tells them itself


class PrefixRouter(FIFOMixin, RequestRouter):
    """See the module."""

    def initialize_state(self, *, imbalance: int = IMBALANCE, **_: Any) -> None:
        """Called by Ray Serve with `request_router_kwargs`."""
        self.imbalance = imbalance
        self._told: dict[ReplicaID, tuple[bytes, frozenset[bytes]]] = {}
        self._routed: dict[ReplicaID, dict[bytes, float]] = {}  # key -> until when it counts as held
        wire.ROUTERS.add(self)  # not a copy: Ray pickles this module by value, with its globals

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas in order of preference, one in each rank."""
        request = pending_request
        if request is None or not candidate_replicas:
            return [candidate_replicas]
        request.routing_context.should_backoff = True  # once all ranks are full
        replica = request.kwargs.get("replica")
        if replica is not None:  # of `listen`; another one refuses the call
            named = [r for r in candidate_replicas if r.replica_id.unique_id == replica]
            return [named or candidate_replicas[:1]]
        route: Any = request.args[2] if len(request.args) > 2 else None
        return [[r] for r in self.ranked(candidate_replicas, route)]

    def ranked(self, replicas: list[RunningReplica], route: Route | None) -> list[RunningReplica]:
        """The replicas, the best first."""
        load = {r.replica_id: self.load(r) for r in replicas}
        least = min(load.values())
        held = {r.replica_id: self.held(r, route) if route else 0 for r in replicas}

        def cost(r: RunningReplica) -> tuple[bool, int, int]:
            own = load[r.replica_id]
            return own - least > self.imbalance, -held[r.replica_id], own

        return sorted(random.sample(replicas, len(replicas)), key=cost)  # equals in random order

    def load(self, replica: RunningReplica) -> int:
        """Requests of a replica: as Ray Serve counts them, or as the replica told last."""
        known = self.replica_queue_len_cache.get(replica.replica_id)
        return replica.routing_stats.get("requests", 0) if known is None else known

    def held(self, replica: RunningReplica, route: Route) -> int:
        """The length in pages of the cached prefix that the replica's engine will find."""
        told, routed, now = self._keys(replica), self._routed.get(replica.replica_id, {}), time.monotonic()

        def cached(i: int) -> bool:
            key = route.pages[i]
            return key in told or routed.get(key, 0.0) > now

        return usable_prefix(len(route.pages), cached, route.window, route.page)

    def _keys(self, replica: RunningReplica) -> Collection[bytes]:
        """The keys that a replica told last, parsed once."""
        data: bytes = replica.routing_stats.get("pages", b"")
        known = self._told.get(replica.replica_id)
        if known is None or known[0] is not data:
            keys = frozenset(data[i : i + NAME] for i in range(0, len(data), NAME))
            known = self._told[replica.replica_id] = data, keys
        return known[1]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remember the pages that the replica is about to compute."""
        if len(pending_request.args) <= 2:
            return
        now, route = time.monotonic(), pending_request.args[2]
        fresh = {key: until for key, until in self._routed.get(replica_id, {}).items() if until > now}
        self._routed[replica_id] = fresh | dict.fromkeys(route.pages, now + FRESH)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica."""
        super().on_replica_actor_died(replica_id)
        self._told.pop(replica_id, None)
        self._routed.pop(replica_id, None)
