"""How tokens are laid out for the forward pass, and their log-probs taken."""
