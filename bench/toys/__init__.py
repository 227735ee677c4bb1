"""Small models that learn to recall in seconds, and what it costs them to read less."""
