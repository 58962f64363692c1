"""``metanudge reproduce solves``."""
