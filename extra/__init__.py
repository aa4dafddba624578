"""Optional parts, each imported only by the configs that use it."""
