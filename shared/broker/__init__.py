"""The message broker: connections, names of exchanges and queues, publishing and notifications."""
