"""Training with nemo-toolkit. Nothing else imports NeMo, and these only run where it is."""
