"""What may be acquired and within which limits: the `Scan` description and the built-in scans."""
