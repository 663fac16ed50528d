"""Every test. Mirrors the code file by file; `system` drives real processes."""
