"""`bench conformance`: schemathesis against the HTTP API: does it keep what its OpenAPI document says?

Schemathesis makes requests from the document, fit and unfit ones, and holds every answer against it. What it cannot
know, people and conversations that exist, is given to it in a configuration file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import trio

from bench import object_store
from bench.http_api import HttpApi
from bench.load import open_stack
from bench.stack import PROJECT

if TYPE_CHECKING:
    import argparse

SEED: Final = 3
EXAMPLES: Final = 100
PHASES: Final = "examples,coverage,fuzzing,stateful"
LONGEST_SECONDS: Final = 3600.0
GROUPS: Final = 4
HOOK_URL: Final = "http://127.0.0.1:9/"
"""Where nobody listens."""
DEVICE: Final = "phone-1"
_SCHEMAS: Final = "#/components/schemas/"
_CLOSED: Final = "Closed"
JUDGED: Final = {
    "add_participants": "users that exist",
    "begin_verification": "either a phone or an email",
    "block": "somebody else",
    "change_agent": "the way to reach it that its kind has",
    "claim_keys": "no device twice, whatever else is said of it",
    "create_agent": "the way to reach it that its kind has, and a class that is there",
    "create_conversation": "users that exist and an agent that is registered, two of them in a 1:1 conversation",
    "edit_message": "a message that has content",
    "complete_media": "an upload whose bytes are there",
    "create_webhook": "a URL that leads to a public address",
    "change_webhook": "a URL that leads to a public address",
    "replay_webhook": "a span that begins before it ends, and in the past",
    "put_identity": "a good signature",
    "add_one_time_keys": "good signatures",
    "send_message": "media or content, a reply to a message of the same conversation",
    "create_media": "a size within what this installation takes",
}
"""Routes with a rule that no schema says, and the rule: a body that fits its schema may still be refused with 400."""
ACCEPTED: Final = ["2xx", "400", "401", "403", "404", "409", "413", "422", "429", "5xx"]
STORED: Final = ("create_media", "resume_media", "complete_media")
"""Routes that ask the object store, which need not be there: then they answer 503."""


class Cast(msgspec.Struct, frozen=True):
    """Who and what there is to ask about; the requests come from the first user."""

    user_token: str
    admin_token: str
    users: list[str]
    conversations: list[str]
    messages: list[str]
    webhooks: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `conformance`."""
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="requests made up per route and phase")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--phases", default=PHASES)
    parser.add_argument("--only", metavar="ROUTE", help="the name of one route (operationId)")
    parser.add_argument("--attach", action="store_true", help="use the running stack")


def main(args: argparse.Namespace) -> int:
    """Exit status 0 when every answer was as documented."""
    with ExitStack() as exits:
        settings = {} if args.attach else {object_store.VARIABLE: exits.enter_context(object_store.run_temporary())}
        stack = exits.enter_context(open_stack(args.attach, settings=settings))
        only = ["--include-operation-id", args.only] if args.only else []
        run = start(
            stack.rest_url, stack.admin_token, "--phases", args.phases, *only, examples=args.examples, seed=args.seed
        )
    print(run.output)
    print(f"{run.seconds:.0f} s")
    return run.status


class Run(msgspec.Struct, frozen=True):
    """How schemathesis ended; `status` 0: no failure, no error, no warning."""

    status: int
    output: str
    seconds: float


def start(
    rest_url: str, admin_token: str, *options: str, examples: int, seed: int, seconds: float = LONGEST_SECONDS
) -> Run:
    """Set the scene and run schemathesis over it, to its end. Blocks; raises TimeoutExpired after `seconds`."""
    cast = trio.run(_set_scene, rest_url, admin_token)
    with tempfile.TemporaryDirectory(prefix="trireme-conformance-") as directory:
        config = Path(directory) / "schemathesis.toml"
        config.write_text(configuration(cast))
        with urllib.request.urlopen(f"{rest_url}/schema/openapi.json", timeout=10) as answer:
            document = Path(directory) / "openapi.json"
            document.write_text(json.dumps(closed(json.load(answer))))
        arguments = [
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(config)),
            *("run", str(document), "--url", rest_url, "--no-color"),
            *("--max-examples", str(examples), "--seed", str(seed)),
            *options,
        ]
        started = time.monotonic()
        ended = subprocess.run(
            arguments,
            env=_environment(cast, rest_url),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            cwd=directory,
        )
    return Run(ended.returncode, ended.stdout + ended.stderr, time.monotonic() - started)


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with answers that may hold nothing but what is named.

    The published one leaves room for more, so that clients are ready for it; here an undocumented field is to be found.
    """
    text = json.dumps(document["components"]["schemas"]).replace(_SCHEMAS, _SCHEMAS + _CLOSED)
    shut = {
        _CLOSED + name: schema | {"additionalProperties": False} if "properties" in schema else schema
        for name, schema in json.loads(text).items()
    }
    document["components"]["schemas"] |= shut
    for operation in (found for path in document["paths"].values() for found in path.values()):
        answers = json.dumps(operation["responses"]).replace(_SCHEMAS, _SCHEMAS + _CLOSED)
        operation["responses"] = json.loads(answers)
    return document


def _environment(cast: Cast, rest_url: str) -> dict[str, str]:
    """What `understudies` and its imports need."""
    return {
        **os.environ,
        "PYTHONPATH": str(PROJECT),
        "TRIREME_REST_URL": rest_url,
        "TRIREME_ADMIN_TOKEN": cast.admin_token,
        "TRIREME_USER_TOKEN": cast.user_token,
    }


def configuration(cast: Cast) -> str:
    """Whose token opens what, and what exists. A JSON string is a TOML string."""
    dictionaries = {
        "users": cast.users,
        "conversations": cast.conversations,
        "messages": cast.messages,
        "devices": [DEVICE],
        "webhooks": cast.webhooks,
        "urls": [HOOK_URL],
    }
    bindings = {
        "path.conversation_id": "conversations",
        "path.message_id": "messages",
        "path.user_id": "users",
        "path.device_id": "devices",
        "path.webhook_id": "webhooks",
        "body.url": "urls",
        "body.participants[*]": "users",
        "body.user_ids[*]": "users",
        "body.user_id": "users",
        "body.reply_to_message_id": "messages",
    }
    lines = [
        "continue-on-failure = true",
        'hooks = "bench.understudies"',
        "[generation]",
        'database = "none"',
        "[auth.openapi.user]",
        f"bearer = {json.dumps(cast.user_token)}",
        "[auth.openapi.admin]",
        f"bearer = {json.dumps(cast.admin_token)}",
        *(f"[dictionaries.{name}]\nvalues = {json.dumps(values)}" for name, values in dictionaries.items()),
        "[parameters]",
        *(f'"{key}" = {{ dictionary = "{name}", probability = 0.8 }}' for key, name in bindings.items()),
    ]
    for name in JUDGED:
        lines += [
            "[[operations]]",
            f"include-operation-id = {json.dumps(name)}",
            f"checks.positive_data_acceptance.expected-statuses = {json.dumps(ACCEPTED)}",
        ]
    for name in STORED:
        lines += [
            "[[operations]]",
            f"include-operation-id = {json.dumps(name)}",
            'checks.not_a_server_error.expected-statuses = ["2xx", "4xx", "503"]',
        ]
    return "\n".join(lines) + "\n"


async def _set_scene(rest_url: str, admin_token: str) -> Cast:
    async with HttpApi(rest_url, admin_token) as api:
        users = [await api.create_user(name) for name in ("Ann", "Bob", "Cat", "Dan")]
        tokens = [await api.create_token(user_id, DEVICE) for user_id in users]
        conversations = [
            *[await api.create_conversation("group", users[1:3], tokens[0]) for _ in range(GROUPS)],
            await api.create_conversation("1:1", [users[1]], tokens[0]),
        ]
        messages = [await _say(api, room, token) for room in conversations for token in tokens[:2]]
        hook = await api.call("POST", "/v1/webhooks", admin_token, {"app": "conformance", "url": HOOK_URL})
        assert isinstance(hook, dict), hook
    return Cast(tokens[0], admin_token, users, conversations, messages, [hook["webhook"]["_id"]])


async def _say(api: HttpApi, conversation_id: str, token: str) -> str:
    body: dict[str, Any] = {"content": "Good morning", "type": "text", "timestamp": 0}
    answer = await api.call("POST", f"/v1/conversations/{conversation_id}/messages", token, body)
    assert isinstance(answer, dict), answer
    message_id: str = answer["message_id"]
    return message_id
