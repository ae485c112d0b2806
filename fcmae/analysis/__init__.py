"""What is inside of encoders: one file for each `python -m fcmae.analyze --what`, and what they share."""
