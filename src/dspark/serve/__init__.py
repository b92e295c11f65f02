"""`dspark serve`: OpenAI's protocol over one engine, a dashboard and metrics."""
