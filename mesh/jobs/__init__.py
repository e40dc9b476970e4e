"""Jobs: what a user submitted, who coordinates it, and how it goes on when a site is lost."""
