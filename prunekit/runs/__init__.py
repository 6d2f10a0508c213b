"""Plan, carry out, resume and compare runs."""
