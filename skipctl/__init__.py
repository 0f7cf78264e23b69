"""skipctl, the operator's command line."""
