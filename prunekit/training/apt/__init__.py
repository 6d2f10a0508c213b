"""APT: adapters that prune and grow while they are trained."""
