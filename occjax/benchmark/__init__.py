"""How fast, beside whom, and what approximation costs."""
