"""How many requests fit in the KV pools, and how full they were."""
