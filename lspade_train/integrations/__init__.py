"""Other projects' ways in: the LM Evaluation Harness, Weights & Biases."""
