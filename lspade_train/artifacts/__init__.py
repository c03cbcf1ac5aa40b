"""Saving, describing and publishing a heads folder."""
