"""From text to a drafter: the target answers prompts, its states become traces, a drafter learns from them."""
