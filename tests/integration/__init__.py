"""Modules on a real MariaDB or MySQL and a real RabbitMQ."""
