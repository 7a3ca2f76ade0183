"""Text on its way in and out: what makes token ids of it, and what reads an answer."""
