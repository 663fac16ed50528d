"""`python -m workers keygen`: a private JWK for `TRIREME_JWT_PRIVATE_KEY`, and its public half for the gateways."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.commands import complain, say
from workers.tokens import new_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print both, a line each."""
    if arguments:
        complain("keygen takes no arguments")
        return 2
    for jwk in new_key():
        say(jwk)
    return 0
