"""Training of the heads with Lightning: data module, module, losses, callbacks."""
