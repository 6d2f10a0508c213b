"""Advice on configs: choices that measured better, or fit the goal better."""
