"""The heads folder as something to keep, describe and publish."""
