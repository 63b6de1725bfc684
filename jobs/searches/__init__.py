"""A small search for each job of the field; `orchestrator run jobs/searches/image.yaml` runs one."""
