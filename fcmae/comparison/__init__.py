"""What `python -m fcmae.compare` measures of its arms, and the report that it writes."""
