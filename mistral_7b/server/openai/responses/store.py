"""Stored responses, in memory and bounded. Imports no torch.

A response is stored with its whole context, so that a conversation survives the loss of its older responses. Items
are kept as encoded JSON, which conversations share: an entry counts all of its items, so the memory in use is at
most the bound. For the event loop's thread only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json, to_json

OVERHEAD = 128  # bytes of an encoded item beyond its text
ID_BYTES = 4  # at most, for each character of an id
Encoded = tuple[str, bytes]  # an item's id, and the item as JSON


@dataclass(frozen=True)
class Stored:
    """One response: its body as JSON, and its context and output items in order."""

    body: bytes
    context: tuple[Encoded, ...]
    output: tuple[Encoded, ...]

    @property
    def items(self) -> tuple[Encoded, ...]:
        """The whole conversation."""
        return self.context + self.output

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.body) + sum(len(data) + ID_BYTES * len(name) + OVERHEAD for name, data in self.items)


class Store:
    """At most `most` responses of `most_bytes` bytes; the least recently used ones are dropped first.

    Each response belongs to an owner, and no other owner can see it.
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self.most, self.most_bytes, self.size = most, most_bytes, 0
        self._entries: OrderedDict[tuple[str, str], Stored] = OrderedDict()
        self._items: dict[
            tuple[str, str], tuple[bytes, int]
        ] = {}  # by id, with the number of entries that have it

    def __len__(self) -> int:
        return len(self._entries)

    def add(
        self, owner: str, body: Mapping[str, Any], before: Sequence[Encoded], items: Sequence[Mapping[str, Any]]
    ) -> None:
        """Store a response with the context `before + items`, unless it alone exceeds the bound."""
        entry = Stored(to_json(body), (*before, *_encoded(items)), _encoded(body["output"]))
        if entry.size > self.most_bytes:
            return
        self._entries[owner, body["id"]] = entry
        self.size += entry.size
        for name, data in dict(entry.items).items():
            self._items[owner, name] = data, self._items.get((owner, name), (data, 0))[1] + 1
        while len(self._entries) > self.most or self.size > self.most_bytes:
            (of, _), oldest = self._entries.popitem(last=False)
            self._forget(of, oldest)

    def get(self, owner: str, name: str) -> Stored | None:
        """The response `name` of `owner`, which becomes the most recently used; None if there is none."""
        entry = self._entries.get((owner, name))
        if entry is not None:
            self._entries.move_to_end((owner, name))
        return entry

    def item(self, owner: str, name: str) -> Any:
        """The item `name` of a stored response of `owner`; None if there is none."""
        found = self._items.get((owner, name))
        return None if found is None else from_json(found[0])

    def remove(self, owner: str, name: str) -> bool:
        """Drop the response `name` of `owner`; return whether there was one."""
        entry = self._entries.pop((owner, name), None)
        if entry is not None:
            self._forget(owner, entry)
        return entry is not None

    def _forget(self, owner: str, entry: Stored) -> None:
        self.size -= entry.size
        for name in dict(entry.items):
            data, count = self._items.pop((owner, name))
            if count > 1:
                self._items[owner, name] = data, count - 1


def _encoded(items: Sequence[Mapping[str, Any]]) -> tuple[Encoded, ...]:
    return tuple((item["id"], to_json(item)) for item in items)
