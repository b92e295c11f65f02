"""How much of a draft is worth verifying: what steps cost, what drafts are worth, and who decides. Needs no model."""
