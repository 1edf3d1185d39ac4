"""The stages: what runs on the compute node. Each joins a plan with the engine."""
