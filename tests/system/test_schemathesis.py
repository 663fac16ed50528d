"""Schemathesis against the running HTTP API: what the OpenAPI document says is what is answered, whatever is asked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from bench import conformance
from workers.rest import app, openapi

if TYPE_CHECKING:
    from tests.system.house import House

ALWAYS_REFUSED = 2
"""Routes that nothing made up opens: they need a code that was sent to somebody."""


@pytest.mark.slow
def test_the_http_api_keeps_what_its_document_says(house: House) -> None:
    """Every check of schemathesis, as a user and as the administrator; `bench conformance` does more of the same."""
    options = ("--phases", "coverage,fuzzing")
    run = conformance.start(
        house.rest_url, house.stack.admin_token, *options, examples=2, seed=conformance.SEED, seconds=240
    )
    assert run.status == 0, run.output
    assert f"Tested: {len(openapi.routes_of(app.ROUTES))}" in run.output
    # Nobody was logged out on the way: all that follows would be a 401, which is documented too.
    refused = re.search(r"(\d+) operations? returned only 401/403", run.output)
    assert refused is None or int(refused[1]) <= ALWAYS_REFUSED, run.output
    assert house.is_alive("rest")
