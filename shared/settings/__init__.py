"""The settings: one frozen object, read once. Import from here; the modules say how they are read and shown."""

from skipbus.shared.settings.load import ConfigurationError, load_settings
from skipbus.shared.settings.model import MySqlSettings, Settings, TlsSettings
from skipbus.shared.settings.peers import PeerSettings
from skipbus.shared.settings.secret import Secret
from skipbus.shared.settings.show import (
    EXIT_BAD_CONFIGURATION,
    config_from_argv,
    describe,
    describe_text,
    load_settings_or_exit,
    problems_text,
    project_version,
)

__all__ = [
    "EXIT_BAD_CONFIGURATION",
    "ConfigurationError",
    "MySqlSettings",
    "PeerSettings",
    "Secret",
    "Settings",
    "TlsSettings",
    "config_from_argv",
    "describe",
    "describe_text",
    "load_settings",
    "load_settings_or_exit",
    "problems_text",
    "project_version",
]
