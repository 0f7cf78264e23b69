"""The message broker: connections, names of exchanges and queues, publishing, consuming and notifications."""
