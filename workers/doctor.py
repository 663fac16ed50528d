"""`python -m workers doctor [ROLE…]`: what is wrong with this environment, in plain words, and what to do about it.

Looks at every setting, at both servers and at what runs; changes nothing, and prints no secret. Exit status: 0 when all
that these roles need is there (without names: all roles), 1 when something is bad.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import anyio
import httpx2
import msgspec

from protocol import keys, webhooks
from protocol.models import DLQStatus
from protocol.webhooks import Reason, WebhookStatus
from workers import inspection, listeners, push_queue
from workers.broker import EVENTS_LIMIT, BrokerUnavailable, open_broker
from workers.commands import say
from workers.fitness import Finding, Level, judge_mongodb, judge_redis
from workers.push.providers import kinds
from workers.settings import DEV, PREFIX, SettingError, Settings, load_settings
from workers.store import StoreUnfit, open_store
from workers.store.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from workers.broker import Broker
    from workers.store import Store

ROLES: Final = ("ingest", "query", "retry", "events", "push", "rest")
SECRETS: Final = frozenset(
    (
        "admin_token",
        "jwt_private_key",
        "verification_webhook_secret",
        "push_webhook_secret",
        "push_vapid_private_key",
        "push_fcm_credentials",
        "push_apns_key",
        "s3_access_key",
        "s3_secret_key",
    )
)
OVERDUE_MS: Final = 60_000
BACKLOG: Final = 1000
"""Entries of a shard that nobody has read: a second's worth of a busy system."""
_ASK_SECONDS: Final = 3.0
_MARKS: Final = {Level.GOOD: "ok  ", Level.DOUBTFUL: "hmm ", Level.BAD: "BAD "}


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print the findings; 1 where one is bad."""
    parser = argparse.ArgumentParser(prog="python -m workers doctor", description="What is wrong here, and what to do.")
    parser.add_argument(
        "role", nargs="*", choices=[*ROLES, []], metavar="ROLE", help="roles this environment is for; all by default"
    )
    roles = parser.parse_args(arguments).role or list(ROLES)
    findings = setting_findings(environ, roles)
    settings = _readable(environ)
    if settings is not None:
        findings += anyio.run(_look_around, settings)
    for finding in findings:
        say(f"{_MARKS[finding.level]} {finding.subject:20} {finding.what}")
        if finding.advice:
            say(f"{'':25} -> {finding.advice}")
    bad = sum(finding.level is Level.BAD for finding in findings)
    doubtful = sum(finding.level is Level.DOUBTFUL for finding in findings)
    say(f"{bad} bad, {doubtful} doubtful, {len(findings) - bad - doubtful} good")
    return int(bad > 0)


# --- settings --------------------------------------------------------------------------------------------------------


def setting_findings(environ: Mapping[str, str], roles: Sequence[str]) -> list[Finding]:
    """What is set, what is missing or malformed, and what is nobody's setting."""
    problems = _problems(environ, roles)
    advice = "see workers/settings.py; TRIREME_ENV=dev supplies what the Procfile's system runs with"
    findings = [Finding("setting", Level.BAD, text, advice) for text in problems]
    known = {f"{PREFIX}{field.name.upper()}": field.name for field in msgspec.structs.fields(Settings)}
    for variable, name in known.items():
        if environ.get(variable) and not any(text.startswith(variable) for text in problems):
            findings.append(Finding("setting", Level.GOOD, f"{variable} = {_shown(name, environ[variable])}"))
    others = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    if others:
        what = f"not settings of the workers: {', '.join(others)}"
        findings.append(Finding("setting", Level.GOOD, what, "fine where the gateway or the bench reads them"))
    if environ.get(f"{PREFIX}ENV") == DEV:
        what = "TRIREME_ENV=dev: secrets that everybody knows are good here"
        findings.append(Finding("setting", Level.DOUBTFUL, what, "fine on your own machine; never where others come"))
    return findings


def _problems(environ: Mapping[str, str], roles: Sequence[str]) -> list[str]:
    """Every setting error, one after the other, each variable once."""
    tried = dict(environ)
    found: dict[str, str] = {}
    while True:
        try:
            load_settings(tried, roles)
        except SettingError as error:
            variable = str(error).split()[0]
            if variable in found:
                break
            found[variable] = str(error)
            tried[variable] = _STAND_INS.get(variable, "")
        else:
            break
    return list(found.values())


_STAND_INS: Final = {
    "TRIREME_REDIS_URL": "redis://unset:6379/0",
    "TRIREME_MONGODB_URL": "mongodb://unset:27017/trireme",
    "TRIREME_ADMIN_TOKEN": "unset",
}
"""What lets the look at settings go on behind one that is missing."""


def _readable(environ: Mapping[str, str]) -> Settings | None:
    """The settings that the servers are reached by, where they can be read."""
    try:
        return load_settings(environ, ())
    except SettingError:
        return None


def _shown(name: str, value: str) -> str:
    if name in SECRETS:
        return "(set, not shown)"
    if "://" in value:
        parts = urlsplit(value)
        where = parts.netloc.rpartition("@")[2]
        hidden = " (credentials not shown)" if "@" in parts.netloc or parts.query else ""
        return f"{parts.scheme}://{where}{parts.path if name.endswith('db_url') else ''}{hidden}"
    return value if len(value) <= 60 else f"{value[:57]}..."


# --- servers ---------------------------------------------------------------------------------------------------------


async def _look_around(settings: Settings) -> list[Finding]:
    """Both servers, and what can be seen through them."""
    findings: list[Finding] = []
    try:
        async with open_store(settings.mongodb_url, settings.message_retention_days, as_it_is=True) as store:
            findings += judge_mongodb(await store.condition())
            findings += await _letters(store)
            findings += await _webhooks(store)
    except StoreUnfit as error:
        findings.append(Finding("mongodb", Level.BAD, str(error), "see README.md, Run it"))
    except StoreUnavailable as error:
        advice = f"is it running at {_shown('mongodb_url', settings.mongodb_url)}, and may we connect?"
        findings.append(Finding("mongodb", Level.BAD, f"MongoDB does not answer: {_one_line(error)}", advice))
    try:
        async with open_broker(settings.redis_url) as broker:
            await broker.ping()
            findings += judge_redis(await inspection.condition(broker), settings.shards)
            findings += await _instances(broker)
            findings += await _shards(broker, settings.shards)
            findings += await _pushes(settings, broker)
            findings += await event_groups(broker)
    except BrokerUnavailable as error:
        advice = f"is it running at {_shown('redis_url', settings.redis_url)}, and may we connect?"
        findings.append(Finding("redis", Level.BAD, f"Redis does not answer: {_one_line(error)}", advice))
    return findings


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0].partition(", Timeout:")[0][:160] if str(error) else type(error).__name__


async def _letters(store: Store) -> list[Finding]:
    counts = dict.fromkeys(DLQStatus, 0)
    for count in await store.dead_letters.counts():
        counts[count.status] += count.letters
    open_letters = counts[DLQStatus.PENDING] + counts[DLQStatus.RETRYING] + counts[DLQStatus.FAILED]
    if not open_letters:
        return [Finding("dead letters", Level.GOOD, "no dead letter waits")]
    said = ", ".join(f"{number} {status}" for status, number in counts.items() if status is not DLQStatus.RESOLVED)
    return [Finding("dead letters", Level.DOUBTFUL, said, "python -m workers dlq list")]


async def _webhooks(store: Store) -> list[Finding]:
    """Who gets nothing any more, and how many do."""
    page, _ = await store.webhooks.page(None, "", webhooks.LIMIT)
    disabled = [webhook for webhook in page if webhook.status is WebhookStatus.DISABLED]
    findings = [
        Finding(
            "webhooks",
            Level.DOUBTFUL,
            f"{webhook.webhook_id} of {webhook.app} is disabled since {_minute(webhook.disabled_at)} "
            f"({webhook.status_reason})",
            f"mend it, POST /v1/webhooks/{webhook.webhook_id}/enable, and replay what was said meanwhile",
        )
        for webhook in disabled
        if webhook.status_reason is not Reason.BY_HAND
    ]
    findings += [
        Finding(
            "webhooks",
            Level.DOUBTFUL,
            f"{webhook.webhook_id} of {webhook.app} has taken nothing since {_minute(webhook.failing_since)}",
            f"GET /v1/webhooks/{webhook.webhook_id}/deliveries?status=failed says why",
        )
        for webhook in page
        if webhook.status is WebhookStatus.ENABLED and webhook.failing_since is not None
    ]
    return findings or [Finding("webhooks", Level.GOOD, f"{len(page) - len(disabled)} webhooks are enabled")]


def _minute(moment: datetime | None) -> str:
    return "" if moment is None else moment.isoformat(timespec="minutes")


async def event_groups(broker: Broker) -> list[Finding]:
    """Apps that read the stream, and those that soon miss something."""
    groups = await listeners.groups(broker)
    late = [group for group in groups if (group.lag or 0) > EVENTS_LIMIT // 2]
    findings = [
        Finding(
            "event groups",
            Level.DOUBTFUL,
            f"group {group.name} has {group.lag} events to read; the stream keeps {EVENTS_LIMIT}",
            f"start its app, or destroy it: XGROUP DESTROY {keys.EVENTS} {group.name}",
        )
        for group in late
    ]
    return findings or [Finding("event groups", Level.GOOD, f"{len(groups)} consumer groups of apps keep up")]


async def _instances(broker: Broker) -> list[Finding]:
    """Who says that it lives, and whether it is ready."""
    live = await broker.live_instances()
    findings = []
    for kind, without in (
        ("worker", "nobody commits messages: start python -m workers ingest query retry"),
        ("gateway", "nobody can connect: start python -m gateway"),
        ("rest", "there is no HTTP API: start python -m workers rest"),
    ):
        names = [name for name, info in live.items() if info.kind == kind]
        if not names:
            findings.append(Finding("processes", Level.BAD, f"no {kind} is alive", without))
        else:
            findings.append(Finding("processes", Level.GOOD, f"{len(names)} {kind} alive"))
    async with httpx2.AsyncClient(timeout=_ASK_SECONDS, trust_env=False) as client:
        for name, info in live.items():
            if info.endpoint:
                findings.append(await _readiness(client, info.kind, name, info.endpoint))
    return findings


async def _readiness(client: httpx2.AsyncClient, kind: str, name: str, endpoint: str) -> Finding:
    parts = urlsplit(endpoint)
    url = f"{parts.scheme.replace('ws', 'http')}://{parts.netloc}/health/ready"
    try:
        answer = await client.get(url)
    except httpx2.TransportError as error:
        what = f"{kind} {name} is alive, but {url} cannot be reached from here ({type(error).__name__})"
        return Finding("processes", Level.DOUBTFUL, what, "fine where that address is not for this machine")
    if answer.status_code == 200:
        return Finding("processes", Level.GOOD, f"{kind} {name} is ready at {parts.netloc}")
    return Finding("processes", Level.BAD, f"{kind} {name} is not ready: {answer.text[:160]}", "its log says more")


async def _pushes(settings: Settings, broker: Broker) -> list[Finding]:
    """Whether somebody tells people by push, and how."""
    offered = ", ".join(kinds(settings))
    findings = [
        Finding("pushes", Level.GOOD, f"devices are told by: {offered}")
        if offered
        else Finding("pushes", Level.DOUBTFUL, "no provider is configured: nobody is woken", "see docs/push.md")
    ]
    late = await push_queue.overdue(broker, _now_ms() - OVERDUE_MS)
    if late:
        what = f"{late} people should have been told a minute ago"
        findings.append(Finding("pushes", Level.BAD, what, "start one more: python -m workers push"))
    return findings


async def _shards(broker: Broker, shards: int) -> list[Finding]:
    loads = await inspection.shard_loads(broker, shards)
    findings = []
    orphans = [load.shard for load in loads if not load.owner]
    if orphans:
        what = f"{len(orphans)} of {shards} shards have no owner: their messages wait"
        advice = "start a worker with the role ingest; a dead one's shards are taken over within 6 s"
        findings.append(Finding("shards", Level.BAD, what, advice))
    else:
        owners = {load.owner for load in loads}
        findings.append(Finding("shards", Level.GOOD, f"{shards} shards have {len(owners)} owners"))
    waiting, pending = sum(load.waiting for load in loads), sum(load.pending for load in loads)
    what = f"{waiting} entries wait to be read, {pending} are being decided"
    if max(load.waiting for load in loads) > BACKLOG:
        advice = "workers are too few or too slow, or MongoDB is: look at trireme_ingest_commit_seconds"
        findings.append(Finding("backlog", Level.DOUBTFUL, what, advice))
    else:
        findings.append(Finding("backlog", Level.GOOD, what))
    return findings


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
