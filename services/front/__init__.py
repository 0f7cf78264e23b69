"""The front: one port before several api processes in containers of their own."""
