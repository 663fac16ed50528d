"""The bad-input matrix of reliability.md section 7 as one table, played against real processes."""
