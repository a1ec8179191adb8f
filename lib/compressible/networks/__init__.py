"""Plain, deep-linear and compressed layers put into any network by name, and how such networks are trained."""
