"""A replica set of three, as its clients can tell: one log of writes, of which a majority holds a prefix.

A write is in the primary's state at once and in the majority's a little later; a failover may take back what no
majority has. Unique indexes judge by the primary's state, majority reads show the other. `mongo.py` speaks to it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from bench.simulation.documents import matches
from workers.store.indexes import index_models

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bench.simulation.documents import Document
    from bench.simulation.network import Network

Collections = dict[str, dict[Any, "Document"]]
SELECTION_SECONDS: Final = 2.0
"""How long an operation waits for a primary (`workers.store`, serverSelectionTimeoutMS)."""
WTIMEOUT_SECONDS: Final = 5.0


class UniqueIndex(NamedTuple):
    """Its name, fields, and which documents are in it."""

    name: str
    fields: tuple[str, ...]
    partial: Mapping[str, Any]

    def key(self, document: Document) -> tuple[Any, ...] | None:
        """What must not be there twice; None for a document that is not in the index."""
        if self.partial and not matches(document, self.partial):
            return None
        return tuple(document.get(field) for field in self.fields)


class Taken(Exception):
    """E11000: another document has this key."""

    def __init__(self, collection: str, index: UniqueIndex, key: tuple[Any, ...]) -> None:
        value = dict(zip(index.fields, key, strict=True))
        super().__init__(
            f"E11000 duplicate key error collection: twin.{collection} index: {index.name} dup key: {value}"
        )
        self.pattern = dict.fromkeys(index.fields, 1)
        self.value = value


class _Write(NamedTuple):
    position: int
    collection: str
    name: Any
    document: Document | None


class Faults:
    """What may go wrong with single operations; off until somebody turns it on."""

    def __init__(self) -> None:
        self.lost = 0.0
        """Part of the operations whose request or reply is lost."""


class ReplicaSet:
    """The set. Everything is atomic but time."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.faults = Faults()
        self.local: Collections = {}
        self.committed: Collections = {}
        self.term = 1
        self.position = 0
        self.majority_position = 0
        self.stalled_until = 0.0
        """Until then the secondaries take nothing."""
        self.primary_at = 0.0
        """Until then there is no primary."""
        self.indexes = unique_indexes()
        self._keys: dict[tuple[str, str], dict[tuple[Any, ...], Any]] = {}
        self._pending: deque[_Write] = deque()
        self._waiting: list[tuple[int, Callable[[bool], None]]] = []

    # --- writing -----------------------------------------------------------------------------------------------------

    def put(self, collection: str, document: Document) -> None:
        """Insert or replace. Raises Taken, and then nothing has changed."""
        name = document["_id"]
        documents = self.local.setdefault(collection, {})
        before = documents.get(name)
        indexes = self.indexes.get(collection, ())
        keys = [(index, index.key(document)) for index in indexes]
        for index, key in keys:
            holder = None if key is None else self._keys.get((collection, index.name), {}).get(key)
            if key is not None and holder is not None and holder != name:
                raise Taken(collection, index, key)
        for index, key in keys:
            taken = self._keys.setdefault((collection, index.name), {})
            old = None if before is None else index.key(before)
            if old is not None and old != key:
                taken.pop(old, None)
            if key is not None:
                taken[key] = name
        documents[name] = document
        self._log(collection, name, document)

    def insert(self, collection: str, document: Document) -> None:
        """Raises Taken."""
        if document["_id"] in self.local.get(collection, {}):
            raise Taken(collection, _ID, (document["_id"],))
        self.put(collection, document)

    def _log(self, collection: str, name: Any, document: Document | None) -> None:
        self.position += 1
        self._pending.append(_Write(self.position, collection, name, document))
        network = self.network
        network.at(network.delay() * 2, None, self._replicate, self.term, self.position)

    def _replicate(self, term: int, position: int) -> None:
        """The secondaries have it, up to this position."""
        if term != self.term or position <= self.majority_position:
            return
        if self.stalled_until > self.network.now:
            self.network.at_time(self.stalled_until, None, self._replicate, term, position)
            return
        pending = self._pending
        while pending and pending[0].position <= position:
            write = pending.popleft()
            documents = self.committed.setdefault(write.collection, {})
            if write.document is None:
                documents.pop(write.name, None)
            else:
                documents[write.name] = write.document
        self.majority_position = position
        due = [waiting for waiting in self._waiting if waiting[0] <= position]
        if due:
            self._waiting = [waiting for waiting in self._waiting if waiting[0] > position]
            for _, call in due:
                call(True)

    def when_majority(self, position: int, call: Callable[[bool], None]) -> None:
        """`call(True)` as soon as a majority has everything up to there; `call(False)` where that cannot be known."""
        if position <= self.majority_position:
            call(True)
            return
        self._waiting.append((position, call))
        self.network.at(WTIMEOUT_SECONDS, None, self._stop_waiting, position, call)

    def _stop_waiting(self, position: int, call: Callable[[bool], None]) -> None:
        if (position, call) in self._waiting:
            self._waiting.remove((position, call))
            call(False)

    # --- what can happen to it ---------------------------------------------------------------------------------------

    def stall(self, seconds: float) -> None:
        """The secondaries fall behind."""
        self.network.note("mongo", "secondaries stall")
        self.stalled_until = self.network.now + seconds

    def reset(self) -> None:
        """Connections to the primary break: who waits for a majority does not hear of it. It stays the primary."""
        self.network.note("mongo", "connections break")
        waiting, self._waiting = self._waiting, []
        for _, call in waiting:
            call(False)

    def fail_over(self, seconds: float) -> None:
        """Another primary after so long. It has some of what no majority had; the rest is rolled back."""
        kept = self.network.rng.randint(0, len(self._pending))
        self.network.note("mongo", "fails over:", kept, "of", len(self._pending), "writes survive")
        self.term += 1
        survivors = list(self._pending)[:kept]
        self._pending.clear()
        self.local = {name: dict(documents) for name, documents in self.committed.items()}
        self._keys = {}
        for collection, documents in self.local.items():
            for document in documents.values():
                self._note_keys(collection, document)
        self.position = self.majority_position
        for write in survivors:
            documents = self.local.setdefault(write.collection, {})
            if write.document is not None:
                before = documents.get(write.name)
                if before is not None:
                    self._forget_keys(write.collection, before)
                documents[write.name] = write.document
                self._note_keys(write.collection, write.document)
            self.position += 1
            self._pending.append(write._replace(position=self.position))
        self.stalled_until = 0.0
        self.primary_at = self.network.now + seconds
        self.reset()
        self.network.at(seconds + self.network.delay(), None, self._replicate, self.term, self.position)

    def _note_keys(self, collection: str, document: Document) -> None:
        for index in self.indexes.get(collection, ()):
            key = index.key(document)
            if key is not None:
                self._keys.setdefault((collection, index.name), {})[key] = document["_id"]

    def _forget_keys(self, collection: str, document: Document) -> None:
        for index in self.indexes.get(collection, ()):
            key = index.key(document)
            if key is not None:
                self._keys.get((collection, index.name), {}).pop(key, None)

    def snapshot(self) -> Collections:
        """What a majority holds now."""
        return {name: dict(documents) for name, documents in self.committed.items()}


_ID: Final = UniqueIndex("_id_", ("_id",), {})


def unique_indexes() -> dict[str, list[UniqueIndex]]:
    """Those of the product, by collection."""
    return {collection: list(indexes) for collection, indexes in _PRODUCT_INDEXES.items()}


def _read_models() -> dict[str, list[UniqueIndex]]:
    found: dict[str, list[UniqueIndex]] = {}
    for collection, models in index_models(90).items():
        for model in models:
            spec = model.document
            if spec.get("unique"):
                fields = tuple(spec["key"])
                found.setdefault(collection, []).append(
                    UniqueIndex(spec["name"], fields, spec.get("partialFilterExpression", {}))
                )
    return found


_PRODUCT_INDEXES: Final = _read_models()
