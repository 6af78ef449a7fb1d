"""All contact with the machinery of JAX. Nothing here knows what a solve is."""
