"""MongoDB's language, as far as this project speaks it: filters, updates, projections, orders, one kind of pipeline.

Pure. Documents are plain dicts and never changed in place: an update makes a new one, so a snapshot is a shallow copy.
What is not spoken raises NotTwinned. The operation fuzz compares all of it with a real server.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import bson
from bson.codec_options import CodecOptions

from bench.simulation.gaps import NotTwinned

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

Document = dict[str, Any]
_MISSING: Final = object()
_OPTIONS: Final[CodecOptions[Document]] = CodecOptions(tz_aware=True)


def stored(document: Mapping[str, Any]) -> Document:
    """A document as it comes back from the server: through BSON and out of it again."""
    return bson.decode(bson.encode(document, codec_options=_OPTIONS), codec_options=_OPTIONS)


# --- filters ---------------------------------------------------------------------------------------------------------


def matches(document: Document, query: Mapping[str, Any]) -> bool:
    """Does the filter let this document through?"""
    for name, wanted in query.items():
        if name == "$or":
            if not any(matches(document, clause) for clause in wanted):
                return False
        elif name[0] == "$":
            raise NotTwinned(name)
        elif not _satisfies(_at(document, name), wanted):
            return False
    return True


def _at(document: Document, path: str) -> Any:
    value = document.get(path, _MISSING)
    if value is _MISSING and "." in path:
        value = document
        for step in path.split("."):
            if not isinstance(value, dict):
                return _MISSING
            value = value.get(step, _MISSING)
    return value


def _satisfies(value: Any, wanted: Any) -> bool:
    if type(wanted) is dict and wanted and next(iter(wanted))[0] == "$":
        return all(_OPERATORS[name](value, operand) for name, operand in wanted.items())
    return _equals(value, wanted)


def _equals(value: Any, wanted: Any) -> bool:
    if value is _MISSING:
        return wanted is None
    return bool(value == wanted) or (type(value) is list and wanted in value)


def _comparable(value: Any, operand: Any) -> bool:
    """MongoDB compares within a type only."""
    if isinstance(operand, (int, float)):
        return isinstance(value, (int, float))
    return isinstance(value, type(operand))


class _Operators(dict[str, Any]):
    def __missing__(self, name: str) -> Any:
        raise NotTwinned(name)


_OPERATORS: Final = _Operators(
    {
        "$in": lambda value, operand: any(_equals(value, one) for one in operand),
        "$nin": lambda value, operand: not any(_equals(value, one) for one in operand),
        "$ne": lambda value, operand: not _equals(value, operand),
        "$exists": lambda value, operand: (value is not _MISSING) == bool(operand),
        "$gt": lambda value, operand: _comparable(value, operand) and value > operand,
        "$gte": lambda value, operand: _comparable(value, operand) and value >= operand,
        "$lt": lambda value, operand: _comparable(value, operand) and value < operand,
        "$regex": lambda value, operand: type(value) is str and re.search(operand, value) is not None,
        "$lte": lambda value, operand: _comparable(value, operand) and value <= operand,
        "$not": lambda value, operand: not _satisfies(value, operand),
        "$type": lambda value, operand: isinstance(value, _TYPES[operand]),
    }
)
_TYPES: Final[dict[str, type[Any]]] = {"string": str, "date": datetime}


def is_given(query: Mapping[str, Any], name: str) -> bool:
    """Is this field compared with a plain value?"""
    wanted = query.get(name, _MISSING)
    return wanted is not _MISSING and type(wanted) is not dict


def candidates(documents: Mapping[Any, Document], query: Mapping[str, Any]) -> Iterable[Document]:
    """Documents among which the filter has to look: by `_id` where it names them."""
    name = query.get("_id", _MISSING)
    if name is _MISSING:
        return documents.values()
    if type(name) is dict:
        wanted = name.get("$in", _MISSING)
        if wanted is _MISSING:
            return documents.values()
        return [documents[one] for one in dict.fromkeys(wanted) if one in documents]
    return [documents[name]] if name in documents else []


# --- updates ---------------------------------------------------------------------------------------------------------


def updated(document: Document, update: Any, *, inserting: bool = False) -> Document:
    """The document after an update; the same object where nothing changes."""
    if isinstance(update, list):
        return _piped(document, update)
    changed = dict(document)
    for operator, fields in update.items():
        if operator == "$setOnInsert":
            if inserting:
                for path, value in fields.items():
                    _put(changed, path, value)
            continue
        for path, operand in fields.items():
            _change(changed, operator, path, operand)
    return document if changed == document else changed


def _piped(document: Document, stages: Sequence[Document]) -> Document:
    changed = dict(document)
    for stage in stages:
        match stage:
            case {"$set": fields}:
                values = {name: _value(changed, expression) for name, expression in fields.items()}
                changed |= {name: value for name, value in values.items() if value is not _MISSING}
            case {"$unset": names}:
                for name in names:
                    changed.pop(name, None)
            case _:
                raise NotTwinned(str(stage))
    return document if changed == document else changed


def _value(document: Document, expression: Any) -> Any:
    """What an aggregation expression comes to."""
    match expression:
        case str() if expression.startswith("$"):
            return document.get(expression[1:], _MISSING)
        case {"$ifNull": [first, otherwise]}:
            value = _value(document, first)
            return _value(document, otherwise) if value is _MISSING or value is None else value
        case {"$max": operands}:
            values = [_value(document, operand) for operand in operands]
            return max((value for value in values if value is not _MISSING and value is not None), default=None)
        case dict() if expression and next(iter(expression)).startswith("$"):
            raise NotTwinned(str(expression))
    return expression


def _change(document: Document, operator: str, path: str, operand: Any) -> None:
    value = _at(document, path)
    match operator:
        case "$set":
            _put(document, path, operand)
        case "$unset":
            _drop(document, path)
        case "$inc":
            _put(document, path, operand if value is _MISSING else value + operand)
        case "$max":
            if value is _MISSING or (_comparable(value, operand) and operand > value):
                _put(document, path, operand)
        case "$addToSet":
            items = [] if value is _MISSING else value
            if operand not in items:
                _put(document, path, [*items, operand])
        case "$pull":
            if value is not _MISSING:
                _put(document, path, [item for item in value if item != operand])
        case _:
            raise NotTwinned(operator)


def _put(document: Document, path: str, value: Any) -> None:
    if "." not in path:
        document[path] = value
        return
    step, _, rest = path.partition(".")
    inner = dict(document.get(step, {}))
    _put(inner, rest, value)
    document[step] = inner


def _drop(document: Document, path: str) -> None:
    if "." not in path:
        document.pop(path, None)
        return
    step, _, rest = path.partition(".")
    if isinstance(document.get(step), dict):
        inner = dict(document[step])
        _drop(inner, rest)
        document[step] = inner


def inserted_by(query: Mapping[str, Any], update: Any) -> Document:
    """What an upsert inserts that found nothing."""
    base = {name: value for name, value in query.items() if name[0] != "$" and is_given(query, name)}
    return updated(base, update, inserting=True)


# --- what is shown ---------------------------------------------------------------------------------------------------


def shown(document: Document, projection: Mapping[str, Any] | None) -> Document:
    """A copy with the fields asked for."""
    if not projection:
        return dict(document)
    is_list = any(wanted for name, wanted in projection.items() if name != "_id")
    if not is_list and set(projection) != {"_id"}:
        return {name: value for name, value in document.items() if projection.get(name, 1)}
    found = {"_id": document["_id"]} if projection.get("_id", 1) else {}
    for name, wanted in projection.items():
        if wanted and name in document:
            found[name] = document[name]
    return found


def ordered(documents: Iterable[Document], sort: Sequence[tuple[str, int]] | None) -> list[Document]:
    """In the order asked for, in that of insertion without one."""
    found = list(documents)
    for name, direction in reversed(sort or ()):
        found.sort(key=lambda document: document[name], reverse=direction < 0)
    return found


def aggregated(documents: Iterable[Document], pipeline: Sequence[Document]) -> list[Document]:
    """$match, $sort, and a $group by one field that takes $first of plain fields."""
    found = list(documents)
    for stage in pipeline:
        match stage:
            case {"$match": query}:
                found = [document for document in found if matches(document, query)]
            case {"$sort": order}:
                found = ordered(found, list(order.items()))
            case {"$group": {"_id": by, "head": {"$first": fields}}}:
                found = list(_grouped(found, by, fields))
            case _:
                raise NotTwinned(str(stage))
    return found


def _grouped(documents: Iterable[Document], by: str, fields: Mapping[str, str]) -> Iterator[Document]:
    seen = set()
    for document in documents:
        name = document[by[1:]]
        if name not in seen:
            seen.add(name)
            yield {
                "_id": name,
                "head": {as_: document[path[1:]] for as_, path in fields.items() if path[1:] in document},
            }
