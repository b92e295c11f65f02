"""Measurements of this project against its peers. Nothing in `src` imports from here."""
