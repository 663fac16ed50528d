"""The auditor: reads what a system has stored, and what its clients saw, and names every invariant that is broken.

The core (`auditor.py`) is pure: documents and events in, violations out. `command.py` is its door on the real servers.
"""
