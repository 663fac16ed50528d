"""The yard: local services, simulated phones, load, the ledger. Product code never imports it."""
