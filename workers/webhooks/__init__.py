"""Events to apps by HTTP, part of the events role: `sink` queues, `couriers` share the webhooks between processes,
`courier` sends to one of them, `call` is one request."""
