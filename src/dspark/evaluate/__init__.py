"""Is the text the target's own, which of two runs is better, and how sure is that?"""
