"""What benches share: timing, tables, layer shapes, environment."""
