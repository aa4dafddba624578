"""Further tasks, a file each: python -m tasks.compare, python -m tasks.bench, and so on."""
