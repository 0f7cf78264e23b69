"""The process that serves encryptors. It may read and write key records; it alone opens wrapping keys."""
