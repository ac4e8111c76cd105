"""./scripts/soak: a real server at work for a while."""
