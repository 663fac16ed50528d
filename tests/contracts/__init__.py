"""What the twins of the simulator and the real servers have in common: the same tests, and a fuzz over both."""
