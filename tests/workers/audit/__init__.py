"""The auditor: its core on a run in memory, its command on real servers."""
