"""Verification codes: five tries, ten minutes, spent once, superseded by the next, and never written down."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import anyio
import pytest

from workers.codes import Codes
from workers.store.verifications import Target

if TYPE_CHECKING:
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
ANN = Target("phone", "+4930123456")


class Postman:
    """A sender that keeps what it was given."""

    def __init__(self) -> None:
        self.codes: list[str] = []

    async def send(self, target: Target, code: str, expires_at: datetime) -> None:
        assert len(code) == 6
        assert code.isdigit()
        self.codes.append(code)

    def wrong(self) -> str:
        """Another code than the last one sent."""
        return f"{(int(self.codes[-1]) + 1) % 1_000_000:06d}"


@pytest.fixture
def postman() -> Postman:
    return Postman()


@pytest.fixture
def codes(settings: Settings, store: Store, postman: Postman) -> Codes:
    return Codes(settings, store, postman)


async def test_the_code_proves_the_target_until_it_is_spent(codes: Codes, postman: Postman) -> None:
    verification_id, expires_at = await codes.begin(ANN, NOW)
    assert expires_at == NOW + timedelta(minutes=10)
    assert await codes.prove(verification_id, postman.wrong(), NOW) is None
    assert await codes.prove("ver_unknown", postman.codes[0], NOW) is None
    assert await codes.prove(verification_id, postman.codes[0], NOW) == ANN
    spent: list[bool] = []

    async def spend() -> None:
        spent.append(await codes.spend(verification_id))

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(spend)
    assert sorted(spent) == [False] * 7 + [True]
    assert await codes.prove(verification_id, postman.codes[0], NOW) is None


async def test_the_sixth_try_is_refused_although_it_is_right(codes: Codes, postman: Postman) -> None:
    verification_id, _ = await codes.begin(ANN, NOW)
    for _ in range(5):
        assert await codes.prove(verification_id, postman.wrong(), NOW) is None
    assert await codes.prove(verification_id, postman.codes[0], NOW) is None


async def test_tries_at_once_are_counted_before_they_are_compared(codes: Codes, postman: Postman) -> None:
    verification_id, _ = await codes.begin(ANN, NOW)
    proven: list[Target | None] = []

    async def attempt() -> None:
        proven.append(await codes.prove(verification_id, postman.codes[0], NOW))

    async with anyio.create_task_group() as group:
        for _ in range(12):
            group.start_soon(attempt)
    assert proven.count(ANN) == 5


async def test_an_old_code_is_refused_before_its_document_is_gone(codes: Codes, postman: Postman, store: Store) -> None:
    verification_id, expires_at = await codes.begin(ANN, NOW)
    assert await codes.prove(verification_id, postman.codes[0], expires_at) is None
    assert await store.db["verifications"].count_documents({}) == 1


async def test_a_new_code_supersedes_the_last_one_to_the_same_place_only(codes: Codes, postman: Postman) -> None:
    first, _ = await codes.begin(ANN, NOW)
    elsewhere, _ = await codes.begin(Target("email", "ann@example.org"), NOW)
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(codes.begin, ANN, NOW)
    assert await codes.prove(first, postman.codes[0], NOW) is None
    assert await codes.prove(elsewhere, postman.codes[1], NOW) == Target("email", "ann@example.org")


async def test_no_code_is_written_down(codes: Codes, postman: Postman, store: Store) -> None:
    await codes.begin(ANN, NOW)
    document = await store.db["verifications"].find_one({})
    assert document is not None
    assert postman.codes[0] not in str(document)
    assert document["code_hash"].startswith("$argon2id$")
