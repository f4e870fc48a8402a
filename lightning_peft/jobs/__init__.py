"""The jobs: one job, one file, each a value of `job=`. A new job is a new file here and in conf."""
