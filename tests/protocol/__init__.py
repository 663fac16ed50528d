"""The language: pure tests, no I/O."""
