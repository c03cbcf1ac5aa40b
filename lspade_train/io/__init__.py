"""Files, remote folders, processes and progress. Independent of models."""
