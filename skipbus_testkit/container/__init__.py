"""Scripts that run inside the key provider's container, in the image's Python. They are copied in, never imported."""
