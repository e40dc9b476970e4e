"""How a model's weights reach the sites that lack its files: manifest, blocks, cache, and the process that moves it."""
