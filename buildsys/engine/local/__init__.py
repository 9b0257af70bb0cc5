"""Steps on this machine: a supervisor process, warm workers, confinement, memory figures."""
