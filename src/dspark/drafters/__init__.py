"""One file per way of guessing; `loading` finds the one that a name, a folder or a user's own file means."""
