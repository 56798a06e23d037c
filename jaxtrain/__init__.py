"""The JAX backend: flax.nnx modules, optax, NamedSharding. Trains what trainspec says."""
