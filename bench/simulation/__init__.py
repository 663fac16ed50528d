"""The deterministic simulator: the real gateways and workers in one Trio run on a virtual clock, over twins of Valkey
and MongoDB, with seeded scheduling and faults.

`network` is time, processes and delays; `keyspace`, `streams`, `scripts` and `valkey` are the twin of Valkey,
`documents`, `replica_set` and `mongo` that of MongoDB; `phones` the clients, `nemesis` the faults, `universe` one run
and its verdict. The twins pass `tests/contracts` beside the real servers. Started by `bench.simulate`.
"""
