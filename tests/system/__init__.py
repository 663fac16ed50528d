"""The whole system as real processes; tests named after the contract sentences of the protocol."""
