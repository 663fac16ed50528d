"""Dead letters over HTTP and on the command line: one way for both, and not a word of what people wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import pytest

from tests.workers.lanes import eventually
from tests.workers.letters import POISON, id_of, letters, postpone, refusing
from tests.workers.seeding import Rest, refusal

if TYPE_CHECKING:
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio

UNKNOWN = "dlq_" + "0" * 28


class Scene:
    """Two people and what one of them could not send."""

    def __init__(self, rest: Rest, store: Store) -> None:
        self.rest = rest
        self.store = store
        self.ann = self.ann_token = self.conversation_id = ""

    async def open(self) -> None:
        self.ann, self.ann_token = await self.rest.user("Ann")
        bob, _ = await self.rest.user("Bob")
        created = await self.rest.call(
            "POST", "/v1/conversations", self.ann_token, {"type": "1:1", "participants": [bob]}
        )
        self.conversation_id = created.json()["_id"]

    async def send(self, key: str, content: str = POISON) -> Any:
        body = {"content": content, "type": "text", "timestamp": 1_700_000_000_000}
        path = f"/v1/conversations/{self.conversation_id}/messages"
        return await self.rest.call("POST", path, self.ann_token, body, Idempotency_Key=key)

    async def bury(self, *keys: str) -> list[str]:
        """Messages that became letters, and wait; their ids."""
        async with refusing(self.store):
            for key in keys:
                assert refusal(await self.send(key)) == (503, "queued_for_retry")
        await postpone(self.store)
        return [id_of(self.conversation_id, self.ann, key) for key in keys]

    async def admin(self, method: str, path: str, body: Any = None) -> Any:
        return await self.rest.call(method, f"/v1/dead-letters{path}", self.rest.admin_token, body)

    async def content(self) -> list[str]:
        found = self.store.db["messages"].find({"conversation_id": self.conversation_id}).sort("sequence_number", 1)
        return [document["content"] async for document in found]


@pytest.fixture
async def scene(rest: Rest, store: Store) -> Scene:
    opened = Scene(rest, store)
    await opened.open()
    return opened


async def test_the_administrator_lists_them_newest_first_by_pages_and_filters(scene: Scene) -> None:
    names = await scene.bury("k1", "k2", "k3")
    pages = []
    cursor = ""
    while True:
        page = (await scene.admin("GET", f"?limit=2{cursor}")).json()
        pages.append([item["_id"] for item in page["items"]])
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert pages == [[names[2], names[1]], [names[0]]]
    assert (await scene.admin("GET", f"?cursor={'9' * 15}.dlq_1")).status_code == 200, "a year that no calendar has"
    assert (await scene.admin("GET", "?status=failed")).json() == {"items": [], "next_cursor": None}
    assert len((await scene.admin("GET", "?status=pending&error_type=storage_failed")).json()["items"]) == 3
    assert (await scene.admin("GET", "?error_type=timeout")).json()["items"] == []
    counts = (await scene.admin("GET", "/statistics")).json()["counts"]
    assert [(count["status"], count["error_type"], count["letters"]) for count in counts] == [
        ("pending", "storage_failed", 3)
    ]


async def test_a_letter_shows_its_content_only_to_who_asks_for_it(scene: Scene) -> None:
    (name,) = await scene.bury("k1")
    listed = await scene.admin("GET", "")
    shown = await scene.admin("GET", f"/{name}")
    raw = await scene.admin("GET", f"/{name}?raw=true")
    assert POISON not in listed.text + shown.text
    letter = shown.json()
    assert (letter["conversation_id"], letter["sender_id"], letter["idempotency_key"]) == (
        scene.conversation_id,
        scene.ann,
        "k1",
    )
    assert letter["message"]["content"] == ""
    assert "raw" not in letter
    assert raw.json()["message"]["content"] == POISON
    assert raw.json()["raw"]


async def test_h21_to_a_user_there_are_no_dead_letters(scene: Scene) -> None:
    (name,) = await scene.bury("k1")
    unknown = await scene.rest.call("GET", "/v1/dead-letters-of-nobody", scene.ann_token)
    for method, path in (
        ("GET", ""),
        ("GET", "/statistics"),
        ("GET", f"/{name}"),
        ("GET", f"/{UNKNOWN}"),
        ("POST", f"/{name}/replay"),
        ("POST", f"/{name}/resolve"),
    ):
        body = {"reason": "x"} if path.endswith("resolve") else None
        answer = await scene.rest.call(method, f"/v1/dead-letters{path}", scene.ann_token, body)
        assert refusal(answer) == (404, "not_found")
        assert answer.json() == unknown.json()
        stranger = await scene.rest.call(method, f"/v1/dead-letters{path}", None, body)
        assert refusal(stranger) == (401, "unauthorized")
    assert [letter["status"] for letter in await letters(scene.store)] == ["pending"]


async def test_h22_a_replay_has_one_effect_and_a_resolved_letter_none(scene: Scene) -> None:
    (name,) = await scene.bury("k1")
    assert (await scene.send("k2", "first")).status_code == 201
    answers: list[Any] = []

    async def ask() -> None:
        answers.append(await scene.admin("POST", f"/{name}/replay"))

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(ask)
    assert sorted(answer.status_code for answer in answers) == [202, 409, 409, 409]
    assert {refusal(answer)[1] for answer in answers if answer.status_code == 409} == {"conflict"}
    (taken,) = [answer.json() for answer in answers if answer.status_code == 202]
    assert (taken["resolved"], taken["letter"]["status"]) == (False, "retrying")

    async def resolved() -> bool:
        (letter,) = await letters(scene.store)
        return bool(letter["status"] == "resolved")

    await eventually(resolved)
    assert await scene.content() == ["first", POISON]
    assert refusal(await scene.admin("POST", f"/{name}/replay")) == (409, "conflict")
    assert refusal(await scene.admin("POST", f"/{name}/resolve", {"reason": "x"})) == (409, "conflict")
    again = await scene.send("k1")
    assert (again.status_code, again.json()["sequence_number"]) == (201, 2)


async def test_a_letter_is_resolved_with_a_reason(scene: Scene) -> None:
    (name,) = await scene.bury("k1")
    assert refusal(await scene.admin("POST", f"/{name}/resolve", {})) == (400, "validation_failed")
    done = await scene.admin("POST", f"/{name}/resolve", {"reason": "the sender was called"})
    assert done.status_code == 200
    letter = done.json()
    assert (letter["status"], letter["resolved_reason"]) == ("resolved", "the sender was called")
    assert letter["resolved_at"]
    assert refusal(await scene.admin("POST", f"/{UNKNOWN}/resolve", {"reason": "x"})) == (404, "not_found")
    assert refusal(await scene.admin("POST", f"/{UNKNOWN}/replay")) == (404, "not_found")
    assert refusal(await scene.admin("GET", f"/{UNKNOWN}")) == (404, "not_found")


@pytest.mark.parametrize("query", ["?limit=0", "?limit=101", "?status=lost", "?error_type=x", "?cursor=x", "?x=1"])
async def test_unfit_questions_are_refused(scene: Scene, query: str) -> None:
    assert refusal(await scene.admin("GET", query)) == (400, "validation_failed")


# --- the command line ------------------------------------------------------------------------------------------------


async def dlq(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m workers dlq …` as an operator runs it."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TRIREME_")}
    environ |= {"TRIREME_REDIS_URL": settings.redis_url, "TRIREME_MONGODB_URL": settings.mongodb_url}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "workers", "dlq", *arguments],
            env=environ,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    return await anyio.to_thread.run_sync(run)


async def test_the_command_line_lists_shows_counts_and_says_no_content(scene: Scene, settings: Settings) -> None:
    (name,) = await scene.bury("k1")
    listed = await dlq(settings, "list")
    assert (listed.returncode, listed.stderr) == (0, "")
    heading, row = listed.stdout.splitlines()
    assert heading.split()[:2] == ["letter", "status"]
    assert row.split()[:4] == [name, "pending", "storage_failed", "0/5"]
    as_json = json.loads((await dlq(settings, "list", "--json", "--status", "pending")).stdout)
    assert as_json["idempotency_key"] == "k1"
    assert (await dlq(settings, "list", "--status", "failed")).stdout == "no dead letters\n"
    shown = await dlq(settings, "show", name)
    counted = await dlq(settings, "stats")
    assert counted.stdout.splitlines()[1].split()[:3] == ["pending", "storage_failed", "1"]
    assert POISON not in listed.stdout + shown.stdout + json.dumps(as_json)
    raw = json.loads((await dlq(settings, "show", name, "--raw")).stdout)
    assert raw["message"]["content"] == POISON
    missing = await dlq(settings, "show", UNKNOWN)
    assert (missing.returncode, missing.stdout) == (1, f"{UNKNOWN}: no such dead letter\n")


async def test_a_dry_run_says_what_a_replay_would_do_and_does_nothing(scene: Scene, settings: Settings) -> None:
    names = await scene.bury("k1", "k2")
    before = await letters(scene.store)
    told = await dlq(settings, "replay", *names, UNKNOWN, "--dry-run")
    assert told.returncode == 1
    lines = told.stdout.splitlines()
    assert lines[0].startswith(f"{names[0]}: would append ")
    assert lines[0].endswith("with its original key and the next number of its conversation")
    assert lines[2] == f"{UNKNOWN}: no such dead letter"
    assert await letters(scene.store) == before
    assert await scene.content() == []


async def test_the_command_line_replays_and_says_what_became_of_it(scene: Scene, settings: Settings) -> None:
    names = await scene.bury("k1", "k2")
    done = await dlq(settings, "replay", "--all", "--status", "pending")
    assert (done.returncode, done.stderr) == (0, "")
    for name in names:
        assert f"{name}: replayed" in done.stdout
        assert f"{name}: resolved: committed as msg_" in done.stdout
    assert await scene.content() == [POISON, POISON]
    again = await dlq(settings, "replay", names[0])
    assert (again.returncode, again.stdout) == (1, f"{names[0]}: refused: it is resolved already\n")


async def test_the_command_line_says_when_a_replay_does_not_come_through(scene: Scene, settings: Settings) -> None:
    names = await scene.bury("k1")
    async with refusing(scene.store):
        done = await dlq(settings, "replay", *names)
    assert done.returncode == 1
    assert f"{names[0]}: pending: Document failed validation" in done.stdout


async def test_the_command_line_resolves_with_a_reason(scene: Scene, settings: Settings) -> None:
    (name,) = await scene.bury("k1")
    assert (await dlq(settings, "resolve", name)).returncode == 2
    done = await dlq(settings, "resolve", name, "--reason", "was sent again")
    assert (done.returncode, done.stdout) == (0, f"{name}: resolved\n")
    assert (await letters(scene.store))[0]["resolved_reason"] == "was sent again"


async def test_a_server_that_is_away_is_one_line(settings: Settings) -> None:
    environ = {"PATH": os.environ["PATH"], "TRIREME_REDIS_URL": "redis://127.0.0.1:1/0"}
    environ["TRIREME_MONGODB_URL"] = settings.mongodb_url

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "workers", "dlq", "list"],
            env=environ, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip

    ended = await anyio.to_thread.run_sync(run)
    assert ended.returncode == 2
    assert ended.stderr.startswith("workers: Redis does not answer: ")
    assert len(ended.stderr.splitlines()) == 1
