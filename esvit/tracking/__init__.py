"""Where results go: log.jsonl is the source of truth, MLflow gets a copy. Imports no torch."""
