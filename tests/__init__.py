"""Tests: `unit` for rules, `integration` on real servers, `system` with whole key providers as processes."""
