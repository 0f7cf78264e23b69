"""The process that keeps KPs in step: it carries signed envelopes between store and bus, and never sees a key."""
