"""Start-up checks and the doctor: every broken environment gets its sentence and its advice, and no secret is shown."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import msgspec
import pytest

from bench.services import free_port
from protocol import dev_keys, keys
from protocol.webhooks import Reason
from tests.workers.apps import now, open_app
from tests.workers.conftest import serving
from tests.workers.letters import POISON
from workers import inspection
from workers.doctor import ROLES, event_groups, setting_findings
from workers.fitness import Finding, Level, judge_mongodb, judge_redis
from workers.inspection import RedisCondition
from workers.store import open_store
from workers.store.condition import Condition

if TYPE_CHECKING:
    from collections.abc import Mapping

    from workers.broker import Broker
    from workers.settings import Settings
    from workers.store import Store

pytestmark = pytest.mark.anyio

FIT_REDIS = RedisCondition("7.2.4", "noeviction", 4, True, True, 2**20, 0)
FIT_MONGODB = Condition("6.0.5", True, True, True, [], 0.01)


def unlike_good(findings: list[Finding]) -> dict[str, Level]:
    return {finding.subject: finding.level for finding in findings if finding.level is not Level.GOOD}


async def test_the_servers_of_the_tests_are_fit(store: Store, broker: Broker) -> None:
    await broker.agree_shards(4)
    assert unlike_good(judge_mongodb(await store.condition())) == {}
    found = unlike_good(judge_redis(await inspection.condition(broker), 4))
    assert set(found) <= {"redis persistence"}


@pytest.mark.parametrize(
    ("change", "subject", "level"),
    [
        ({"version": "6.2.1"}, "redis version", Level.BAD),
        ({"version": "strange"}, "redis version", Level.BAD),
        ({"policy": "allkeys-lru"}, "redis eviction", Level.BAD),
        ({"shards": 8}, "redis shards", Level.BAD),
        ({"aof": False}, "redis persistence", Level.DOUBTFUL),
        ({"aof_ok": False}, "redis persistence", Level.DOUBTFUL),
        ({"max_memory_bytes": 2**20}, "redis memory", Level.DOUBTFUL),
    ],
)
def test_a_redis_that_is_not_fit_gets_a_sentence_and_advice(
    change: dict[str, object], subject: str, level: Level
) -> None:
    assert unlike_good(judge_redis(FIT_REDIS, 4)) == {}
    (finding,) = [
        one for one in judge_redis(msgspec.structs.replace(FIT_REDIS, **change), 4) if one.level is not Level.GOOD
    ]
    assert (finding.subject, finding.level) == (subject, level)
    assert finding.what
    assert finding.advice


@pytest.mark.parametrize(
    ("change", "subject", "level"),
    [
        ({"is_replica_set": False}, "mongodb replica set", Level.BAD),
        ({"has_primary": False}, "mongodb replica set", Level.BAD),
        ({"majority_journal": False}, "mongodb journal", Level.BAD),
        ({"majority_journal": None}, "mongodb journal", Level.DOUBTFUL),
        ({"unfenced": ["messages (a, b)"]}, "mongodb indexes", Level.BAD),
        ({"skew_seconds": -5.0}, "clocks", Level.DOUBTFUL),
        ({"skew_seconds": 3600.0}, "clocks", Level.DOUBTFUL),
    ],
)
def test_a_mongodb_that_is_not_fit_gets_a_sentence_and_advice(
    change: dict[str, object], subject: str, level: Level
) -> None:
    assert unlike_good(judge_mongodb(FIT_MONGODB)) == {}
    (finding,) = [
        one for one in judge_mongodb(msgspec.structs.replace(FIT_MONGODB, **change)) if one.level is not Level.GOOD
    ]
    assert (finding.subject, finding.level) == (subject, level)
    assert finding.advice


async def test_an_index_that_is_missing_or_not_unique_is_seen(new_mongodb_url: str) -> None:
    async with open_store(new_mongodb_url) as store:
        await store.db["messages"].drop_index("conversation_sequence")
        await store.db["messages"].create_index([("conversation_id", 1), ("sequence_number", 1)])
        await store.db["users"].drop_index("unique_phone")
        assert (await store.condition()).unfenced == [
            "messages (conversation_id, sequence_number)",
            "users (phone)",
        ]


# --- settings --------------------------------------------------------------------------------------------------------


def test_every_setting_that_is_wrong_is_named_not_only_the_first() -> None:
    environ = {
        "TRIREME_REDIS_URL": "http://x",
        "TRIREME_BATCH": "many",
        "TRIREME_REST_PORT": "0",
        "TRIREME_ADMIN_TOKEN": dev_keys.ADMIN_TOKEN,
    }
    bad = [found.what for found in setting_findings(environ, ROLES) if found.level is Level.BAD]
    named = {text.split()[0] for text in bad}
    assert named >= {
        "TRIREME_REDIS_URL",
        "TRIREME_BATCH",
        "TRIREME_REST_PORT",
        "TRIREME_MONGODB_URL",
        "TRIREME_JWT_PRIVATE_KEY",
    }
    only_ingest = setting_findings({"TRIREME_REDIS_URL": "redis://x", "TRIREME_MONGODB_URL": "mongodb://y"}, ["ingest"])
    assert unlike_good(only_ingest) == {}


def test_no_secret_is_shown() -> None:
    environ = {
        "TRIREME_ENV": "dev",
        "TRIREME_REDIS_URL": "redis://user:hunter2@cache:6379/0",
        "TRIREME_MONGODB_URL": "mongodb://user:hunter2@db:27017/trireme?authMechanismProperties=hunter2",
        "TRIREME_ADMIN_TOKEN": "hunter2",
        "TRIREME_JWT_PRIVATE_KEY": dev_keys.PRIVATE_JWK,
        "TRIREME_VERIFICATION_WEBHOOK_URL": "https://hunter2@hook/hunter2?token=hunter2",
        "TRIREME_VERIFICATION_WEBHOOK_SECRET": "whsec_" + "hunter2A" * 4,
        "TRIREME_S3_SECRET_KEY": "hunter2",
        "TRIREME_S3_ACCESS_KEY": "hunter2",
        "TRIREME_SOMETHING": "hunter2",
    }
    text = "\n".join(found.line for found in setting_findings(environ, ROLES))
    assert "hunter2" not in text
    assert dev_keys.PUBLIC_X not in text
    assert "redis://cache:6379 (credentials not shown)" in text
    assert "mongodb://db:27017/trireme (credentials not shown)" in text
    assert "TRIREME_SOMETHING" in text


# --- the command -----------------------------------------------------------------------------------------------------


async def doctor(environ: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRIREME_")}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "workers", "doctor", *arguments],
            env={**clean, **environ},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return await anyio.to_thread.run_sync(run)


async def test_the_doctor_finds_nothing_bad_with_what_runs_but_the_gateway_that_does_not(
    settings: Settings, store: Store, broker: Broker
) -> None:
    environ = {
        "TRIREME_REDIS_URL": settings.redis_url,
        "TRIREME_MONGODB_URL": settings.mongodb_url,
        "TRIREME_SHARDS": "4",
    }
    await broker.agree_shards(4)
    async with serving(settings, store, broker, owner=True):
        seen = await doctor(environ, "ingest", "query")
    lines = seen.stdout.splitlines()
    assert seen.stderr == ""
    bad = [line for line in lines if line.startswith("BAD")]
    assert [line.split(maxsplit=2)[2] for line in bad] == ["no gateway is alive"]
    assert any("-> nobody can connect: start python -m gateway" in line for line in lines)
    assert any(line.endswith("4 shards have 1 owners") for line in lines)
    assert any("is ready at 127.0.0.1" in line for line in lines)
    assert seen.returncode == 1
    assert POISON not in seen.stdout


async def test_the_doctor_says_which_server_does_not_answer(settings: Settings) -> None:
    nobody = free_port()
    environ = {
        "TRIREME_REDIS_URL": f"redis://user:hunter2@127.0.0.1:{nobody}/0",
        "TRIREME_MONGODB_URL": f"mongodb://127.0.0.1:{nobody}/x?directConnection=true",
    }
    seen = await doctor(environ, "ingest")
    assert seen.returncode == 1
    assert "BAD  mongodb" in seen.stdout
    assert "MongoDB does not answer" in seen.stdout
    assert f"-> is it running at redis://127.0.0.1:{nobody} (credentials not shown)" in seen.stdout
    assert "hunter2" not in seen.stdout + seen.stderr
    assert seen.stderr == ""


async def test_shards_without_an_owner_are_named(settings: Settings, broker: Broker) -> None:
    await broker.agree_shards(4)
    environ = {"TRIREME_REDIS_URL": settings.redis_url, "TRIREME_MONGODB_URL": settings.mongodb_url}
    seen = await doctor({**environ, "TRIREME_SHARDS": "4"}, "ingest")
    assert "4 of 4 shards have no owner: their messages wait" in seen.stdout
    other = await doctor({**environ, "TRIREME_SHARDS": "8"}, "ingest")
    assert "TRIREME_SHARDS is 8, but this installation was started with 4" in other.stdout


async def test_webhooks_that_get_nothing_and_groups_that_read_nothing_are_named(
    settings: Settings, store: Store, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, failing, fine = [await open_app(store, "https://a.example/") for _ in range(3)]
    await store.webhooks.disable(gone.webhook_id, Reason.GONE, now())
    await store.webhooks.failed(failing.webhook_id, now())
    redis: Any = broker.client
    await redis.xgroup_create(keys.EVENTS, "crm", id="0", mkstream=True)
    for _ in range(3):
        await redis.xadd(keys.EVENTS, {"r": "x"})
    seen = await doctor({"TRIREME_REDIS_URL": settings.redis_url, "TRIREME_MONGODB_URL": settings.mongodb_url})
    assert f"{gone.webhook_id} of crm is disabled since" in seen.stdout
    assert f"-> mend it, POST /v1/webhooks/{gone.webhook_id}/enable, and replay" in seen.stdout
    assert f"{failing.webhook_id} of crm has taken nothing since" in seen.stdout
    assert fine.webhook_id not in seen.stdout
    assert "1 consumer groups of apps keep up" in seen.stdout
    monkeypatch.setattr("workers.doctor.EVENTS_LIMIT", 4)
    (finding,) = await event_groups(broker)
    assert finding.what == "group crm has 3 events to read; the stream keeps 4"
