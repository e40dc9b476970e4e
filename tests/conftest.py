"""For every test: hypothesis judges what an example does and not how long a busy machine took for it."""

from hypothesis import settings

settings.register_profile("isthmus", deadline=None)
settings.load_profile("isthmus")
