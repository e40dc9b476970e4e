"""How fast a site gets its slices from two others, and what a kill in the middle costs."""
