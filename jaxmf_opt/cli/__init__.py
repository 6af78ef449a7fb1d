"""The main job: `python -m jaxmf_opt`."""
