"""Role `rest`: the HTTP API. Reads MongoDB; changes conversations and membership through the ingest stream only."""
