"""The yard: client session, ledger."""
