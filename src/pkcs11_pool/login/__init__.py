"""Who is logged in to a token: one thread per token that alone logs in and out."""
