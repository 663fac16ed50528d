"""The Trio process that holds the WebSocket connections. Speaks WebSocket and Redis only; never MongoDB, never
asyncio."""
