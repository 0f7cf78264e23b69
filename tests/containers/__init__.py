"""What operators and testers run: the image, the Compose files and the testkit, on a real engine."""
