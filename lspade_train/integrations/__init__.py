"""Integrations with other projects: LM Evaluation Harness, Weights & Biases."""
