"""./scripts/fuzz: nonsense and damage for everything that takes bytes from outside."""
