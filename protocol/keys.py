"""Every Redis key, stream, group and id format. No other module spells a key.

The shard of a conversation decides its ingest stream; a message id carries its shard, so that a receipt, which
names only the message, reaches the right stream.
"""

from __future__ import annotations

from hashlib import blake2b
from zlib import crc32

DEFAULT_SHARDS = 64
"""Shards of the ingest log; fixed at first start and recorded under `SHARDS` (design.md section 4)."""
MAX_SHARDS = 4096
"""A message id holds its shard in three hexadecimal digits."""

SHARDS = "shards"
"""string: the shard count of this installation; written once, a process with another setting refuses to start."""
QUERY = "query"
"""stream: reads the gateways need from MongoDB; any worker; capped, since a lost query is asked again."""
EVENTS = "events"
"""stream: CloudEvents for agents and webhooks."""
NOTIFICATIONS = "notifications"
"""stream: push jobs (`protocol.records.PushJob`), each with its user; capped."""
PUSH_DUE = "push:due"
"""sorted set: who may not have got what was said, by the epoch ms at which somebody looks; see `push_entry`."""
PUSH_CLAIMED = "push:claimed"
"""sorted set: those entries that a push role has in hand, by the epoch ms at which its lease of them ends."""
PUSH_EPOCH = "push:epoch"
"""string: the run id of the Redis in which the two sets above are whole."""
PUSH_REPAIR = "push:repair"
"""string: id of the push role that fills them again; 1 min."""
INSTANCES = "instances"
"""set: ids of all gateway, REST and worker instances that may be alive; each has its own `instance:{id}` lease."""

INGEST_GROUP = "ingest"
INGEST_CONSUMER = "owner"
"""One fixed consumer name per shard: the owner of the moment reads as it, so pending entries follow the shard."""
QUERY_GROUP = "query"
EVENTS_GROUP = "dispatch"
FIELD = b"r"
"""The field of a stream entry: the encoded record."""
LETTER_FIELD = b"l"
"""A second one, where the entry is the replay of a dead letter: that letter's id."""
EVENT_MESSAGE_FIELD = b"m"
"""Beside the event in `events`: the id of the message it is about."""
NOTIFICATION_USER_FIELD = b"u"
"""Beside the job in `notifications`: whose devices it is for."""

CONNECTION_TTL_SECONDS = 3600
PRESENCE_TTL_SECONDS = 300
SESSION_TTL_SECONDS = 3600
AGENT_TTL_SECONDS = 300
INTENT_TTL_SECONDS = 3600
INBOX_TTL_SECONDS = 30 * 86400
INSTANCE_TTL_SECONDS = 10
"""Renewed every 2.5 s. Whoever has died is seen within 12 s, so that its users are offline within 15 s."""
LEASE_TTL_MS = 5000
INBOX_LIMIT = 10_000
"""Most ids an inbox keeps: it is an accelerator, so the oldest go first (100 conversations × one page of 100)."""


def ingest(shard: int) -> str:
    """stream, owned by the holder of the shard's lease; trimmed by MINID behind the last acknowledged entry."""
    return f"ingest:{shard}"


def trials(shard: int) -> str:
    """hash entry id → weight of the deaths of owners who tried this entry alone; a day. Empty but for entries whose
    readers died."""
    return f"trials:{shard}"


TRIALS_TTL_SECONDS = 86_400


def lease(shard: int) -> str:
    """string: id of the owning worker; 5 s, renewed twice a second."""
    return f"lease:shard:{shard}"


def down(instance_id: str) -> str:
    """stream of records for one gateway or REST instance; trimmed by the instance itself."""
    return f"down:{instance_id}"


def instance(instance_id: str) -> str:
    """string: liveness lease of an instance, 10 s; value `protocol.records.InstanceInfo`."""
    return f"instance:{instance_id}"


CONNECTION_PREFIX = "connection:"


def connection(user_id: str) -> str:
    """hash device_id → ConnectionRegistry; 1 h, refreshed by the gateway's sweep."""
    return f"connection:{user_id}"


def presence(user_id: str) -> str:
    """string Presence, 5 min; also the pub/sub channel of its changes."""
    return f"presence:{user_id}"


def inbox(user_id: str) -> str:
    """list of ids of undelivered messages, for users without a live device; 30 days from the newest."""
    return f"inbox:{user_id}"


def users(instance_id: str) -> str:
    """set: users with a connection at this gateway: their presence ends with it. Kept by the registry scripts, taken
    apart by the worker that buries the instance; 1 h."""
    return f"users:{instance_id}"


SEEN = "seen"
"""sorted set: users who came or went lately, by epoch ms, until a worker has written it to their accounts."""
SEEN_LIMIT = 100_000
"""Most users that wait there; the rest is written when they come or go again."""


MIGRATION_PREFIX = "mig_"
"""A session token of a `migration` frame begins so; a JWT never does."""
MIGRATION_TTL_SECONDS = 60


def migration(session_token: str) -> str:
    """string `protocol.records.MigrationTicket`, 60 s, taken by the gateway that redeems it (GETDEL). The key holds a
    hash: who can list keys cannot redeem them."""
    return "migration:" + blake2b(session_token.encode(), digest_size=16).hexdigest()


def allowance(purpose: str, subject: str) -> str:
    """string: how often `subject` (an address, a phone number, a user id) has done this in the window; its TTL is the
    window. The key holds a hash of the subject."""
    return f"allowance:{purpose}:" + blake2b(subject.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


USER_CHANNEL_PREFIX = "user:"
PRESENCE_PREFIX = "presence:"
NOTIFICATION_PREFIX = "notification:"


def user_channel(user_id: str) -> str:
    """pub/sub: user-scoped control events (`protocol.records.UserSignal`)."""
    return f"user:{user_id}"


def notification_channel(user_id: str) -> str:
    """pub/sub: what a user's devices should hear of (`protocol.records.Tell`), and push jobs (`records.PushJob`)."""
    return f"notification:{user_id}"


def push_entry(user_id: str, conversation_id: str, device_id: str = "") -> str:
    """Member of `PUSH_DUE` and `PUSH_CLAIMED`. With a device: a job is told to this device again, to no other."""
    return f"{user_id} {conversation_id} {device_id}".rstrip()


def agent(agent_id: str) -> str:
    """string: agent registry cache, 5 min; empty for the moment of a change (`workers.agents.registry`)."""
    return f"agent:{agent_id}"


AGENT_PARTITIONS = 16
"""Into so many parts the conversations with agents are shared out; each has one process of the role `agents`."""
AGENT_GROUP = "agents"


def agent_tasks(partition: int) -> str:
    """stream of what agents are to be asked; capped, since the tasks themselves are in MongoDB."""
    return f"agents:tasks:{partition}"


def agent_lease(partition: int) -> str:
    """string: id of the instance whose agents answer this partition; 5 s, renewed twice a second."""
    return f"lease:agents:{partition}"


def session(user_id: str) -> str:
    """string: which access tokens of the user are good, 1 h; dropped by whoever changes it (`workers.revocation`)."""
    return f"session:{user_id}"


def intent(message_hash: str) -> str:
    """string: intent cache, 1 h, only for conversations flagged plaintext."""
    return f"intent:{message_hash}"


def shard_of(conversation_id: str, shards: int) -> int:
    """The shard of a conversation: CRC-32 of its id modulo the shard count."""
    return crc32(conversation_id.encode()) % shards


def new_id(prefix: str, now_ms: int, entropy: int) -> str:
    """`usr_`, `conv_`, `sess_` ids: prefix, 44 bits of epoch ms, 64 bits of entropy; sorts by time."""
    return f"{prefix}_{now_ms:011x}{entropy & 0xFFFF_FFFF_FFFF_FFFF:016x}"


def new_message_id(now_ms: int, entropy: int, shard: int) -> str:
    """`msg_`, 44 bits of epoch ms, 48 bits of entropy, 12 bits of shard; sorts by time (right-leaning index)."""
    return f"msg_{now_ms:011x}{entropy & 0xFFFF_FFFF_FFFF:012x}{shard:03x}"


MESSAGE_ID_LENGTH = 4 + 11 + 12 + 3


def made_at_ms(message_id: str) -> int:
    """The time written in a message id of ours, epoch milliseconds."""
    return int(message_id[4:15], 16)


def shard_of_message(message_id: str, shards: int) -> int | None:
    """The shard written in a message id, or None when it is no id of ours."""
    if len(message_id) != MESSAGE_ID_LENGTH or not message_id.startswith("msg_"):
        return None
    try:
        shard = int(message_id[-3:], 16)
    except ValueError:
        return None
    return shard if shard < shards else None


def trace_id(conversation_id: str, sender_id: str, idempotency_key: str) -> str:
    """What logs call a message from its first moment on: a hash of what names it, so nobody has to carry it."""
    return "tr_" + blake2b(f"{conversation_id}\0{sender_id}\0{idempotency_key}".encode(), digest_size=10).hexdigest()


def direct_conversation_id(user_a: str, user_b: str) -> str:
    """The id of the 1:1 conversation of two users: the same whoever asks first, so creating it is idempotent."""
    low, high = sorted((user_a, user_b))
    return "conv_" + blake2b(f"{low}\0{high}".encode(), digest_size=14).hexdigest()
