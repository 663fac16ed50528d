"""`python -m workers keygen [vapid]`: a private JWK for `TRIREME_JWT_PRIVATE_KEY` and its public half for the gateways;
with `vapid` a private key for `TRIREME_PUSH_VAPID_PRIVATE_KEY`, and the public half that browsers subscribe with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.commands import complain, say
from workers.push.web_push import new_vapid_key
from workers.tokens import new_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print both, a line each."""
    if list(arguments) not in ([], ["vapid"]):
        complain("keygen takes no arguments but vapid")
        return 2
    for half in new_vapid_key() if arguments else new_key():
        say(half)
    return 0
