"""Files, folders behind URLs, processes and progress. Knows nothing of models."""
