"""Reports of runs as JSON, HTML, CSV and text."""
