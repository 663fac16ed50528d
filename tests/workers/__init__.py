"""The workers, on a real Valkey and a real mongod."""
