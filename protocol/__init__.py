"""The one language of the gateway, the workers and the bench.

Frames, models, records, keys, codes and the pure rules over them. Nothing in this package waits, reads a
clock, opens a socket or draws a random number: time and entropy arrive as arguments.
"""
