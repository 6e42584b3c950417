"""Integer counts of an evaluation, and the scores that follow from them."""
