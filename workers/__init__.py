"""The anyio/uvloop processes: the only owners of MongoDB, and the HTTP API."""
