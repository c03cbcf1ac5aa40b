"""Lightning around the heads: data module, module, losses, callbacks."""
